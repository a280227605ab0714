"""Packing: best fit against an obvious version, padding, long documents, what fills a row, targets."""

from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config.data import Data
from components.data.documents import BadRecord, Record
from components.data.encoding import Encoded, Seat, TokensEncoder, Where
from components.data.mixture import Feed, Mixture
from components.data.order import Place, RandomDeal
from components.data.packing import Packing, best_fit, fitted, rows_of
from components.data.rows import Counts, Row
from components.mesh.batch import IGNORE
from tests.components.data.corpus import Numbered, loaders, run, streamed

Made = list[tuple[Row, tuple[int, ...]]]


def obvious(lengths: list[int], room: int) -> list[list[int]]:
    """Longest first, each into the row where the least is left after it."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        left = [room - sum(lengths[i] for i in row) for row in rows]
        fits = [r for r in range(len(rows)) if left[r] >= lengths[item]]
        if fits:
            rows[min(fits, key=lambda r: (left[r], r))].append(item)
        else:
            rows.append([item])
    return rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_what_it_says(lengths: list[int]) -> None:
    assert best_fit(lengths, 20) == obvious(lengths, 20)


def made(lengths: list[int], kind: Any, *, seq_len: int = 15, window: int = 3, **packing: Any) -> tuple[Made, Counts]:
    """All rows of one stream over documents in their order; each document once."""
    counts = Counts()
    walk = RandomDeal(Numbered(lengths), streams=1, seed=None, epochs=1).open({0: Place(0, 0)})[0]
    settings = Packing(seq_len, kind=kind, window=window, **packing)
    encoder = TokensEncoder(1 << 30)

    def encode(document: Any) -> Encoded | None:
        return fitted(encoder.encode(document.read(), document.where, Seat(0, 0)), settings, document.where)

    mixture = Mixture([Feed("", walk, encode)], [1], lambda x: len(x.tokens), (0, 0, 0, 0))
    return list(rows_of(mixture, settings, 0, counts, pad=True)), counts


def held(row: Row) -> list[list[int]]:
    """What a row holds, each document with the label of its last token, without padding."""
    documents: dict[int, list[int]] = {}
    for token, label, document in zip(row.tokens, row.labels, row.document_ids, strict=True):
        tokens = documents.setdefault(int(document), [int(token)])
        if label != IGNORE:
            tokens.append(int(label))
    return [x for x in documents.values() if x != [0]]


@settings(deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=60), st.integers(1, 5))
def test_best_fit_keeps_documents_whole(lengths: list[int], window: int) -> None:
    rows, counts = made(lengths, "best_fit", window=window)
    documents = [(100 * d + np.arange(n)).tolist() for d, n in enumerate(lengths)]
    got = [x for row, _ in rows for x in held(row)]
    assert sorted(got) == documents
    filled = sum(min(15, sum(map(len, held(row)))) for row, _ in rows)
    assert (counts.row_tokens, counts.padding_tokens) == (15 * len(rows), 15 * len(rows) - filled)
    at = 0  # windows take documents in their order, fill at most so many rows, and rows are in that order too
    while rows:
        size = next(i for i, (_, cursor) in enumerate(rows, 1) if cursor[0] == 0)
        mine = [[x[0] // 100 for x in held(row)] for row, _ in rows[:size]]
        numbers = sorted(i for row in mine for i in row)
        assert numbers == list(range(at, at + len(numbers)))
        assert size <= window
        assert mine == sorted(sorted(row) for row in mine)
        packed = obvious([lengths[i] for i in numbers], 16)
        assert sorted(mine) == sorted(sorted(numbers[i] for i in row) for row in packed)
        assert [cursor[:3] for _, cursor in rows[: size - 1]] == [(i, 0, at) for i in range(1, size)]
        at, rows = at + len(numbers), rows[size:]
    assert at == len(lengths)


def test_rows_of_best_fit() -> None:
    rows, counts = made([10, 4, 7, 6, 8, 5, 3], "best_fit", seq_len=15, window=2, document_mask=True)
    assert [[x[0] // 100 for x in held(row)] for row, _ in rows] == [[0, 3], [1, 2], [4, 5, 6]]
    first = rows[0][0]
    assert first.tokens.tolist() == [*range(10), *range(300, 305)]
    assert first.labels.tolist() == [*range(1, 10), IGNORE, *range(301, 306)]
    assert first.positions.tolist() == [*range(10), *range(5)]
    second = rows[1][0]
    assert second.tokens.tolist() == [*range(100, 104), *range(200, 207), 0, 0, 0, 0]
    assert second.labels.tolist() == [101, 102, 103, IGNORE, *range(201, 207), *[IGNORE] * 5]
    assert second.positions.tolist() == [*range(4), *range(7), 0, 1, 2, 3]
    assert second.document_ids.tolist() == [*[0] * 4, *[1] * 7, *[2] * 4]
    assert [x for _, x in rows] == [(1, 0, 0, 0, 0), (0, 0, 4, 27, 0), (0, 1, 0, 43, 0)]
    assert (counts.padding_tokens, counts.row_tokens) == (4, 45)


@pytest.mark.parametrize(("window", "least"), [(8, 0.92), (32, 0.97), (128, 0.99)])
def test_how_full_rows_are(window: int, least: float) -> None:
    draw = Random(0)
    lengths = [max(2, min(1025, int(draw.lognormvariate(5, 1)))) for _ in range(4000)]
    walk = RandomDeal(Numbered(lengths), streams=1, seed=0, epochs=None).open({0: Place(0, 0)})[0]
    counts, packing = Counts(), Packing(1024, kind="best_fit", window=window)
    mixture = Mixture([Feed("", walk, lambda x: Encoded(np.asarray(x.read()), None))], [1], lambda x: 1, (0, 0, 0, 0))
    list(islice(rows_of(mixture, packing, 0, counts, pad=False), 512))
    assert counts.row_tokens == 512 * 1024
    assert 1 - counts.padding_tokens / counts.row_tokens > least


def test_padded_gives_each_document_its_row() -> None:
    rows, counts = made([3, 5, 1], "padded", seq_len=4)
    assert [row.tokens.tolist() for row, _ in rows] == [[0, 1, 2, 0], [100, 101, 102, 103], [200, 0, 0, 0]]
    ignored = [IGNORE] * 4
    assert [row.labels.tolist() for row, _ in rows] == [[1, 2, IGNORE, IGNORE], [101, 102, 103, 104], ignored]
    assert [row.document_ids.tolist() for row, _ in rows] == [[0, 0, 0, 1], [0] * 4, [0, 1, 1, 1]]
    assert [x for _, x in rows] == [(0, 0, 1, 3, 0), (0, 0, 2, 8, 0), (0, 1, 0, 9, 0)]
    assert (counts.padding_tokens, counts.row_tokens) == (4, 12)


@pytest.mark.parametrize("kind", ["padded", "best_fit"])
@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("split", [[0, 1, 2], [100, 101, 102, 103, 104], [104, 105, 106, 107, 108], [108, 109], [200, 201]]),
        ("truncate", [[0, 1, 2], [100, 101, 102, 103, 104], [200, 201]]),
        ("truncate_left", [[0, 1, 2], [105, 106, 107, 108, 109], [200, 201]]),
        ("drop", [[0, 1, 2], [200, 201]]),
    ],
)
def test_long_documents(kind: str, policy: str, rows: list[list[int]]) -> None:
    got, _ = made([3, 10, 2], kind, seq_len=4, window=1, long_documents=policy)
    documents = [x for row, _ in got for x in held(row)]
    assert documents == rows if kind == "padded" else sorted(documents) == rows
    state = {"split": 15, "drop": 5}.get(policy, 10)  # what has been served
    assert got[-1][1] == (0, 1, 0, state, 0)


def test_split_documents_predict_each_token_once() -> None:
    for length in range(2, 30):
        rows, _ = made([length], "padded", seq_len=4)
        assert [int(x) for row, _ in rows for x in row.labels if x != IGNORE] == list(range(1, length))
    rows, _ = made([11], "padded", seq_len=4)
    assert [cursor for _, cursor in rows] == [(1, 0, 0, 0, 0), (2, 0, 0, 0, 0), (0, 1, 0, 11, 0)]
    rows, _ = made([3, 90, 5], "best_fit", seq_len=4, window=2)  # longer than a window
    assert [int(x) for row, _ in rows for x in row.labels if 100 <= x < 200] == list(range(101, 190))


def test_concat_cuts_whatever_is_said_of_long_documents() -> None:
    for policy in ("drop", "error", "truncate"):
        source = streamed(Numbered([50]), streams=1, seed=None, ending="pad", encoder=TokensEncoder(1 << 20),
                          long_documents=policy)  # fmt: skip
        rows = torch.cat([x[0, 1] for x, _ in run(loaders(source, 1, 1))])
        assert rows[rows != IGNORE].tolist() == list(range(1, 50))


def test_a_long_document_that_is_an_error() -> None:
    def source(**more: Any) -> Any:
        documents, encoder = Numbered([5, 40, 6]), TokensEncoder(1 << 20)
        return streamed(documents, streams=1, seed=None, ending="stop", encoder=encoder, kind="padded", **more)

    with pytest.raises(BadRecord) as error:
        list(run(loaders(source(long_documents="error"), 1, 1)))
    assert str(error.value) == (
        "document 1 of the dataset, counted from 0: a document of 40 tokens is longer than a row, which takes 17"
        ' (training.seq_len + 1), and data.long_documents = "error" refuses it; raise training.seq_len, set'
        " data.long_documents to split, truncate, truncate_left or drop, or leave such documents out with"
        ' data.on_bad_record = "skip"'
    )
    for policy, report in (("error", (1, 0)), ("drop", (0, 1))):
        for workers in (0, 1):
            (loader,) = loaders(source(long_documents=policy, skip_bad=True), 1, 1, workers)
            assert len(list(run([loader]))) == 2
            got = loader.report()
            assert (got["skipped_records"], got["dropped_documents"]) == report


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_rank_tells_of_its_rows(workers: int) -> None:
    encoder = TokensEncoder(1 << 20)
    source = streamed(Numbered([10, 20, 5, 17]), streams=2, ending="pad", seed=None, encoder=encoder, kind="padded")
    (loader,) = loaders(source, 2, 1, workers)
    names = ("skipped_records", "dropped_documents", "targetless_documents", "padding_tokens", "row_tokens")
    zero = dict.fromkeys(names, 0)
    assert loader.report() == zero
    steps = list(run([loader]))
    assert len(steps) == 3  # stream 0 has documents of 10 and 5, and then nothing; stream 1 of 20, in two rows, and 17
    padding = 6 + 11 + 16 + (16 - 4) + 0
    assert loader.report() == zero | {"padding_tokens": padding, "row_tokens": 6 * 16}


class Marked(TokensEncoder):
    """A loss at every third token."""

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        tokens = super().encode(record, where, seat).tokens
        return Encoded(tokens, tokens % 3 == 0)


@pytest.mark.parametrize(("kind", "policy"), [("concat", "split"), ("best_fit", "split"), ("padded", "truncate_left")])
def test_labels_are_targets(kind: str, policy: str) -> None:
    lengths = [5, 30, 2, 8, 13, 40, 7]
    source = streamed(
        Numbered(lengths), streams=1, seed=None, ending="pad", encoder=Marked(1 << 20), kind=kind, long_documents=policy
    )
    labels = torch.cat([x[0, 1] for x, _ in run(loaders(source, 1, 1))])
    kept = [np.arange(n)[-17:] if policy == "truncate_left" else np.arange(n) for n in lengths]
    expected = [100 * d + i for d, x in enumerate(kept) for i in x[1:] if (100 * d + i) % 3 == 0]
    assert sorted(labels[labels != IGNORE].tolist()) == expected


class Late(TokensEncoder):
    """A loss at the tokens from the twentieth on, and in every other document at none."""

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        tokens = super().encode(record, where, seat).tokens
        return Encoded(tokens, (tokens % 100 >= 20) & (tokens // 100 % 2 == 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "policy", "kept"),
    [
        ("concat", "truncate", [0, 4, 6]),
        ("best_fit", "split", [0, 4, 6]),
        ("best_fit", "truncate", []),
        ("padded", "truncate_left", [0, 4, 6]),
        ("padded", "truncate", []),
    ],
)
def test_documents_without_a_target_are_left_out_and_counted(
    kind: str, policy: str, kept: list[int], workers: int
) -> None:
    def ranks(lengths: list[int]) -> list[Any]:
        documents, encoder = Numbered(lengths), Late(1 << 20)
        return loaders(streamed(documents, streams=2, seed=None, ending="pad", encoder=encoder, kind=kind,
                                long_documents=policy), 2, 1, workers)  # fmt: skip

    lengths = [30, 30, 9, 30, 40, 5, 21]
    found = ranks(lengths)
    rows = [x for x, _ in run(found)]
    assert found[0].report()["targetless_documents"] == len(lengths) - len(kept)
    held_so = sorted({int(x) // 100 for row in rows for x in row[:, 1].flatten() if x != IGNORE})
    assert held_so == kept
    again = [x for x, _ in run(ranks([n if i in kept else 0 for i, n in enumerate(lengths)]))]
    assert len(rows) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))


def test_a_resume_leaves_out_the_same_documents() -> None:
    draw = Random(3)
    documents = Numbered([draw.randint(1, 40) for _ in range(30)])
    for kind in ("concat", "best_fit", "padded"):
        source = streamed(documents, streams=2, encoder=Late(1 << 20), kind=kind, long_documents="truncate_left")
        (loader,) = loaders(source, 2, 1)
        steps = list(run([loader], 12))
        for at in range(11):
            loader.load_state(loader.state_dict(steps[at][1]))
            assert torch.equal(next(run([loader], 1))[0], steps[at + 1][0])


def test_the_fingerprint_has_what_rows_depend_on() -> None:
    concat = {"seq_len": 8, "document_mask": False, "cross_document_labels": False, "packing": "concat"}
    assert Packing(8, window=5, long_documents="drop").fingerprint == concat
    padded = Packing(8, kind="padded", window=5).fingerprint
    assert padded == concat | {"packing": "padded", "long_documents": "split"}
    best = Packing(8, kind="best_fit", window=5).fingerprint
    assert best == concat | {"packing": "best_fit", "long_documents": "split", "packing_window": 5}
    assert Packing(8).window == Data().packing_window
