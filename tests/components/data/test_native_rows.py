"""Rows of the native order: the stream that they are cut from, its mixture, its ends, and that nothing moves them."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from components.data import native_rows
from components.data.index_cache import IndexCache
from components.data.indexed import IndexedRows, RowIndex
from components.data.megatron_rows import MegatronRows
from components.data.native_order import Mixture, OwnOrder, Progress, Unit
from components.data.native_rows import NativeRows
from components.data.quota import whole_weights
from components.data.rows import Ending
from components.data.splits import TokenSlice
from components.data.token_files import open_tokens
from components.data.token_rows import TokenSource
from components.runtime.errors import DataError
from tests.components.data.corpus import loaders, run
from tests.components.data.token_sources import NoCache, numbered, source, write_tokens

SEQ = 8
LENGTHS = ([9, 5, 20, 0, 3], [8] * 9, [1, 2, 40, 4])


def three(epochs: int | None = None) -> list[TokenSource]:
    """Sources whose tokens say where they stand, of which one is seldom asked."""
    weights = (1.0, 3.0, 0.2)
    return [source(str(d), x, weights[d], epochs, first=1000 * d) for d, x in enumerate(LENGTHS)]


def native(sources: Sequence[TokenSource], **changes: Any) -> NativeRows:
    settings: dict[str, Any] = {"seq_len": SEQ, "rows": 30, "seed": 1, "ending": "repeat", "cache": NoCache()}
    return NativeRows(sources, **(settings | changes))


def stream(sources: Sequence[TokenSource], documents: int, seed: int | None = 1) -> list[list[int]]:
    """The first documents of a job."""
    orders = [OwnOrder(x.files.lengths, name=x.name, seed=seed, epochs=x.epochs) for x in sources]
    mixture = Mixture(orders, whole_weights([x.weight for x in sources]), "tokens")
    chosen = mixture.take([Progress(0, 0)] * len(sources), documents)
    return [sources[d].files.read(i).tolist() for d, i in zip(*(x.tolist() for x in chosen), strict=True)]


def cut(documents: Sequence[Sequence[int]], n: int) -> tuple[list[int], list[int]]:
    """Tokens of row n, and the documents that they belong to, counted from 0."""
    labelled = [(x, i) for i, document in enumerate(documents) for x in document][n * SEQ : (n + 1) * SEQ + 1]
    there = sorted({i for _, i in labelled})
    return [x for x, _ in labelled], [there.index(i) for _, i in labelled]


def row(rows: RowIndex, n: int) -> tuple[list[int], list[int]]:
    tokens, ids = rows.row(n)
    return tokens.tolist(), ids.tolist()


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_are_cut_from_one_stream(seed: int | None) -> None:
    rows, documents = native(three(), seed=seed), stream(three(), 200, seed)
    assert rows.count is None
    assert [row(rows, n) for n in range(40)] == [cut(documents, n) for n in range(40)]


def test_a_longer_index_begins_the_same() -> None:
    short, long = native(three(), rows=1), native(three(), rows=6000)
    assert len(short._segments) < len(long._segments)
    for n in (0, 5, 3000, 5999):
        assert row(short, n) == row(long, n)
    assert short._ends == long._ends


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_across_segments(size: int) -> None:
    whole = native(three())
    expected = [row(whole, n) for n in range(30)]
    with patch.object(native_rows, "SMALLEST", size), patch.object(native_rows, "LARGEST", 2 * size):
        rows = native(three())
        assert len(rows._segments) > 10 // size
        assert [row(rows, n) for n in range(30)] == expected
        found = [rows.mixture(n) for n in range(30)]
    assert found == [whole.mixture(n) for n in range(30)]


@pytest.mark.parametrize(("ending", "count"), [("stop", 19), ("pad", 20), ("repeat", 19)])
def test_ends(ending: Ending, count: int) -> None:
    tokens = sum(map(sum, LENGTHS))
    assert divmod(tokens - 1, SEQ) == (19, 3)  # the last row is short
    rows, documents = native(three(1), ending=ending, rows=100), stream(three(1), 100)
    assert rows.count == count
    assert [row(rows, n) for n in range(count)] == [cut(documents, n) for n in range(count)]
    assert len(rows.row(count - 1)[0]) == (4 if ending == "pad" else SEQ + 1)


def test_a_number_of_epochs_outlives_the_ending() -> None:
    for ending in ("stop", "pad"):
        assert native([source("a", [17])], ending=ending).count == 2
        assert native([source("a", [17], epochs=3)], ending=ending).count == {"stop": 6, "pad": 7}[ending]
    assert native([source("a", [17], epochs=1), source("b", [9])]).count is None


def test_exactly_full_rows_need_no_padding() -> None:
    for ending in ("stop", "pad"):
        rows = native([source("a", [17])], ending=ending)
        assert rows.count == 2
        assert [len(rows.row(n)[0]) for n in range(2)] == [9, 9]


@pytest.mark.parametrize(("unit", "bound"), [("tokens", 40), ("documents", 1)])
def test_the_mixture_of_every_prefix_keeps_the_quotas(unit: Unit, bound: int) -> None:
    index, shares = native(three(), seq_len=1, unit=unit), np.array([1.0, 3.0, 0.2]) / 4.2
    sources = [int(index.row(n)[0][0]) // 1000 for n in range(600)]
    for n in range(600):
        found = index.mixture(n)
        if unit == "tokens":
            assert found == {str(d): sources[:n].count(d) for d in range(3)}
        given = np.array(list(found.values()))
        assert (np.abs(given - shares * given.sum()) < bound).all()


def test_a_copy_maps_the_index_itself(tmp_path: Path) -> None:
    rows = native([source("a", [2] * 20)], rows=2000, cache=IndexCache(tmp_path))
    raw = pickle.dumps(rows)
    assert len(raw) < 6000 < rows._segments[0]["starts"].nbytes
    assert row(pickle.loads(raw), 1999) == row(rows, 1999)


def test_fingerprint() -> None:
    a, b = source("a", [5], 2.0, 3), source("b", [7])
    assert native([a, b]).fingerprint == {
        "order": "native",
        "unit": "tokens",
        "shuffle_seed": 1,
        "sources": {
            "a": {"content": a.files.content_key, "weight": 2.0, "epochs": 3},
            "b": {"content": b.files.content_key, "weight": 1.0, "epochs": None},
        },
    }
    assert native([a, b], ending="stop").fingerprint == native([a, b]).fingerprint


def test_what_it_refuses() -> None:
    with pytest.raises(DataError) as error:
        native([source("a", [5]), source("b", [[], []])])
    assert str(error.value) == "source 'b': no tokens in its documents; give more, or another split"


@pytest.mark.filterwarnings("error")
def test_less_than_a_row() -> None:
    a, b = source("a", [4]), source("b", [4], epochs=1)
    for sources, ending, message in (
        (
            [a, b],
            "stop",
            "sources 'a' and 'b' together are shorter than one row of 8 tokens: 8 in all, but with the last"
            " label at least 9 are needed; give more documents, more epochs, or a smaller training.seq_len",
        ),
        (
            [source("a", [1])],
            "pad",
            "source 'a' is shorter than one row of 8 tokens: 1 in all, but with the last label at"
            " least 2 are needed; give more documents",
        ),
    ):
        with pytest.raises(DataError) as error:
            native(sources, ending=ending)
        assert str(error.value) == message
    assert native([source("a", [5]), b], ending="stop").count == 1
    assert native([a], ending="repeat").row(0)[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    with pytest.raises(DataError) as error:
        native([source("a", [[1, 2, 9]], epochs=9)], vocab_size=9).row(0)
    assert str(error.value) == (
        "source 'a', document 0, counted from 0: token ids from 1 to 9, but the model's vocabulary has 9; take the"
        " tokenizer that the files were made with, and a flavor whose vocabulary holds it"
    )


def indexed(folder: Path, order: str) -> IndexedRows:
    """Rows from files on disk, as a job reads them."""
    sources = []
    for d, lengths in enumerate(LENGTHS):
        prefix = folder / f"part{d}"
        if not prefix.with_suffix(".idx").exists():
            write_tokens(prefix, numbered(lengths, 1000 * d))
        files = open_tokens(str(prefix))
        part = TokenSlice(
            files, 0, files.sequences if order == "megatron" else len(files), sequences=order == "megatron"
        )
        sources.append(TokenSource(str(d), part, (1.0, 3.0, 0.2)[d]))
    cache = IndexCache(folder / "cache")
    index: RowIndex
    if order == "megatron":
        index = MegatronRows(sources, seq_len=SEQ, samples=4 * STEPS, seed=5, cache=cache)
    else:
        index = NativeRows(sources, seq_len=SEQ, rows=2, seed=5, ending="repeat", cache=cache)
    return IndexedRows(index, global_batch=4, document_mask=True, ending="repeat")


STEPS = 14
LAYOUTS = [(dp, workers) for workers in (0, 1, 3) for dp in (1, 2, 4)]


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_restore_at_every_position_on_another_layout(tmp_path: Path, order: str) -> None:
    whole = list(run(loaders(indexed(tmp_path, order), 4, 1), STEPS))
    state = loaders(indexed(tmp_path, order), 4, 1)[0].state_dict([])
    for at in range(STEPS):
        for degree in (1, 2, 4):
            ranks = loaders(indexed(tmp_path, order), 4, degree)
            for rank in ranks:
                rank.load_state(json.loads(json.dumps(state)))
            rest = list(run(ranks, STEPS - at))
            assert torch.equal(torch.stack([x for x, _ in rest]), torch.stack([x for x, _ in whole[at:]]))
            assert [t for _, t in rest] == [t for _, t in whole[at:]]
        state = ranks[0].state_dict(rest[0][1])


def _workers_change_nothing(folder: Path, order: str, layouts: Sequence[tuple[int, int]], ats: Sequence[int]) -> None:
    whole = list(run(loaders(indexed(folder, order), 4, 1), STEPS))
    for degree, workers in layouts:
        for at in ats:
            ranks = loaders(indexed(folder, order), 4, degree, workers)
            if at:
                for rank in ranks:
                    rank.load_state(rank.state_dict(whole[at - 1][1]))
            rest = list(run(ranks, STEPS - at))
            assert torch.equal(torch.stack([x for x, _ in rest]), torch.stack([x for x, _ in whole[at:]]))


@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_change_nothing(tmp_path: Path, order: str) -> None:
    _workers_change_nothing(tmp_path, order, [(1, 3), (2, 1)], [0, 5])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_change_nothing_anywhere(tmp_path: Path, order: str) -> None:
    _workers_change_nothing(tmp_path, order, LAYOUTS, range(STEPS))
