"""What a row holds: packing, borders, ends."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.data.files import open_files
from components.data.rows import make_row, padding_row
from components.mesh.batch import IGNORE
from components.runtime.errors import DataError
from tests.components.data.corpus import SEQ, loaders, run, streamed, synthetic, texts, tokenizer, write_lines

BOS, EOS = 0, 1


def packed(document: str) -> list[int]:
    return [BOS, *tokenizer().encode(document), EOS]


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.zst"])
@pytest.mark.parametrize("streams", [1, 3, 4, 30])
def test_each_token_is_predicted_once(tmp_path: Path, extension: str, streams: int) -> None:
    documents = texts(23)
    path = write_lines(tmp_path / f"x.{extension}", documents)
    source = streamed(open_files(str(path)), streams=streams, seed=None, ending="pad")
    batches = [x for x, _ in run(loaders(source, streams, 1))]
    for s in range(streams):
        expected = [packed(x) for x in documents[s::streams]]
        tokens, labels = (torch.stack([b[s, i] for b in batches]).flatten() for i in (0, 1))
        assert labels[labels != IGNORE].tolist() == [t for x in expected for t in x[1:]]
        assert tokens[labels != IGNORE].tolist() == [t for x in expected for t in x[:-1]]


def test_an_epoch_holds_each_document_once(tmp_path: Path) -> None:
    documents = texts(23)
    for name in ("x.jsonl", "x.jsonl.gz"):
        path = write_lines(tmp_path / name, documents)
        source = streamed(open_files(str(path)), streams=1, seed=5, ending="pad", seq_len=4000)
        ((batch, _),) = run(loaders(source, 1, 1))
        pieces = [batch[0, 0][batch[0, 3] == i].tolist() for i in range(23)]
        assert sorted(pieces) == sorted(packed(x) for x in documents)
        assert pieces != [packed(x) for x in documents]  # shuffled


FIVE, OF = np.array([5, 6, 7, 8, 9]), np.array([0, 0, 1, 1, 2])


def test_a_row_without_mask_runs_across_borders_but_for_labels() -> None:
    row = make_row(FIVE, OF, 4, document_mask=False)
    assert [x.tolist() for x in row] == [[5, 6, 7, 8], [6, IGNORE, 8, IGNORE], [0, 1, 2, 3], [0, 0, 1, 1]]
    row = make_row(FIVE, OF, 4, document_mask=False, cross_document_labels=True)
    assert [x.tolist() for x in row] == [[5, 6, 7, 8], [6, 7, 8, 9], [0, 1, 2, 3], [0, 0, 1, 1]]


def test_a_label_is_what_a_loss_may_be_taken_at() -> None:
    for cross, labels in ((False, [6, IGNORE, IGNORE, IGNORE]), (True, [6, 7, IGNORE, IGNORE])):
        row = make_row(
            FIVE[:4],
            OF[:4],
            4,
            document_mask=False,
            cross_document_labels=cross,
            targets=np.array([True, True, True, False]),
        )
        assert [x.tolist() for x in row[:2]] == [[5, 6, 7, 8], labels]
    first = make_row(FIVE, OF, 4, document_mask=False, targets=np.array([False, True, False, True, True]))
    assert first.labels.tolist() == [6, IGNORE, 8, IGNORE]  # whether the first token is a target decides nothing


def test_a_row_with_mask_stops_at_borders() -> None:
    row = make_row(FIVE, OF, 4, document_mask=True)
    assert [x.tolist() for x in row] == [[5, 6, 7, 8], [6, IGNORE, 8, IGNORE], [0, 1, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(("mask", "positions"), [(True, [0, 1, 0, 1]), (False, [0, 1, 2, 3])])
def test_a_short_row_is_padded(mask: bool, positions: list[int]) -> None:
    row = make_row(np.array([5, 6]), np.array([0, 0]), 4, document_mask=mask)
    expected = [[5, 6, 0, 0], [6, IGNORE, IGNORE, IGNORE], positions, [0, 0, 1, 1]]
    assert [x.tolist() for x in row] == expected


def test_padding_has_no_labels() -> None:
    assert [x.tolist() for x in padding_row(2)] == [[0, 0], [IGNORE, IGNORE], [0, 1], [0, 0]]


def test_masked_documents_of_a_stream(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", texts(40, longest=6))
    crossing = streamed(open_files(str(path)), streams=2, cross_document_labels=True)
    plain, masked = (
        torch.cat([x for x, _ in run(loaders(source, 2, 1), 9)])
        for source in (crossing, streamed(open_files(str(path)), streams=2, mask=True))
    )
    assert torch.equal(plain[:, 0], masked[:, 0])  # tokens
    assert torch.equal(plain[:, 3], masked[:, 3])  # documents
    begins = masked[:, 0] == BOS
    border = torch.cat([begins[:, 1:], plain[:, 1, -1:] == BOS], dim=1)  # the label is another document's first token
    assert torch.equal(masked[:, 1], plain[:, 1].masked_fill(border, IGNORE))
    assert (masked[:, 2][begins] == 0).all()
    inside = ~begins[:, 1:]
    assert torch.equal(masked[:, 2, 1:][inside], masked[:, 2, :-1][inside] + 1)
    assert torch.equal(masked[:, 3, 1:] - masked[:, 3, :-1], begins[:, 1:].long())
    assert torch.equal(plain[:, 2], torch.arange(SEQ).expand_as(plain[:, 2]))


def test_without_begin_and_end_tokens(tmp_path: Path) -> None:
    documents = texts(9)
    path = write_lines(tmp_path / "x.jsonl", documents)
    source = streamed(open_files(str(path)), streams=1, seed=None, bos=False, eos=False)
    tokens = torch.cat([x[0, 0] for x, _ in run(loaders(source, 1, 1), 4)]).tolist()
    assert tokens == [t for x in documents for t in tokenizer().encode(x)][: 4 * SEQ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_stop_ends_before_the_first_step_that_is_not_full(tmp_path: Path, name: str) -> None:
    documents = texts(23)
    path = write_lines(tmp_path / name, documents)
    source = streamed(open_files(str(path)), streams=3, seed=None, ending="stop")
    tokens = [sum(len(packed(x)) for x in documents[s::3]) for s in range(3)]
    (loader,) = loaders(source, 3, 1)
    steps = list(run([loader]))
    assert len(steps) == min((n - 1) // SEQ for n in tokens)
    loader.load_state(loader.state_dict(steps[-1][1]))
    assert list(loader) == []


def test_a_stream_without_text_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["", "a b c", "d e f"])
    source = streamed(open_files(str(path)), streams=3, seed=None, bos=False, eos=False)
    with pytest.raises(DataError) as error:
        next(iter(loaders(source, 3, 1)[0]))
    assert str(error.value) == (
        "the dataset: one of the streams found nothing to pack in 16 epochs of it, though other documents of it can be"
        " packed; give more documents, or set data.streams lower"
    )


def test_synthetic_rows_are_a_function_of_their_number() -> None:
    ((first, table),) = run(loaders(synthetic(4), 4, 1), 1)
    assert table == [[4], [5], [6], [7]]
    assert int(first[:, 0].max()) < 100
    assert first[0, 0, :6].tolist() == [97, 40, 4, 24, 16, 35]
    assert (first[:, 3, -1] > 0).all()  # several documents
