"""Rows in Megatron-LM's order against the samples that its rules say, token by token."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import megatron_rows
from components.data.index_cache import IndexCache
from components.data.megatron_order import blend, document_index, epochs_of, shuffle_index
from components.data.megatron_rows import MegatronRows
from components.data.splits import TokenSlice
from components.data.token_files import open_tokens
from components.data.token_rows import Tokens, TokenSource
from components.data.token_writer import IndexedWriter
from components.runtime.errors import ConfigError, DataError
from tests.components.data.token_sources import NoCache, source


def _slow_samples(files: Tokens, samples: int, seq_len: int, seed: int) -> list[list[int]]:
    """All samples of a source in Megatron-LM's order, each of L + 1 tokens."""
    epochs = epochs_of(files.lengths, samples, seq_len)
    state = np.random.RandomState(seed)
    order = document_index(len(files.lengths), epochs.count, state, separate=epochs.separate)
    stream = np.concatenate([files.read(int(d)) for d in order]).tolist()
    rows = [stream[a : a + seq_len + 1] for a in range(0, len(stream) - seq_len, seq_len)]
    before = ((epochs.count - 1) * epochs.tokens - 1) // seq_len if epochs.separate else len(rows)
    return [rows[i] for i in shuffle_index(before, len(rows), state)]


def _tokens(rows: MegatronRows, n: int) -> list[int]:
    tokens, ids = rows.row(n)
    borders = np.flatnonzero(np.diff(ids)) + 1  # tokens of a document are consecutive numbers
    assert ids[0] == 0
    assert np.diff(ids).max(initial=0) <= 1
    assert all((np.diff(x) == 1).all() for x in np.split(tokens, borders))
    return tokens.tolist()


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


@given(lengths, st.integers(1, 60), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_single_source(lengths: list[int], samples: int, seq_len: int, seed: int) -> None:
    only = source("", lengths)
    rows = MegatronRows([only], seq_len=seq_len, samples=samples, seed=seed, cache=NoCache())
    expected = _slow_samples(only.files, samples, seq_len, seed)
    assert rows.count == samples
    assert [_tokens(rows, n) for n in range(samples)] == expected[:samples]


DOCUMENTS = ([9, 5, 20, 3], [8] * 9, [1, 2, 30, 0, 4])


def _blended(
    weights: list[float], samples: int, sizes: Sequence[int], seq_len: int = 4
) -> tuple[MegatronRows, list[list[int]]]:
    """Rows of three sources, and those that are expected: blended of samples that so many were prepared of."""
    sources = [source(str(i), x, weights[i], first=1000 * i) for i, x in enumerate(DOCUMENTS)]
    rows = MegatronRows(sources, seq_len=seq_len, samples=samples, seed=11, cache=NoCache())
    of = [_slow_samples(x.files, size, seq_len, 11) for x, size in zip(sources, sizes, strict=True)]
    return rows, [of[d][i] for d, i in zip(*(x.tolist() for x in blend(weights, samples)), strict=True)]


@pytest.mark.parametrize("samples", [40, 9])
def test_several_sources(samples: int) -> None:
    weights = [1.0, 3.0, 2.0]
    sizes = [int(np.ceil(np.ceil(samples * x / 6) * 1.005)) for x in weights]  # as many epochs as its share needs
    rows, expected = _blended(weights, samples, sizes)
    assert rows.count == samples
    assert [_tokens(rows, n) for n in range(samples)] == expected
    given = np.bincount(blend(weights, 7).sources, minlength=3).tolist()
    assert rows.mixture(7) == {str(d): 4 * x for d, x in enumerate(given)}


def test_samples_as_weights_are_megatrons_order_without_weights() -> None:
    there = [(sum(x) - 1) // 4 for x in DOCUMENTS]  # of one pass over each, which is what it takes then
    rows, expected = _blended([float(x) for x in there], 30, there)
    assert [_tokens(rows, n) for n in range(30)] == expected


@pytest.mark.filterwarnings("error")
def test_sources_that_are_shorter_than_a_row_are_repeated_as_there() -> None:
    rows, expected = _blended([1.0, 3.0, 2.0], 6, [2, 4, 3], seq_len=80)
    assert [_tokens(rows, n) for n in range(6)] == expected


def test_files_are_taken_by_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add_document(np.arange(9), [4, 3, 2])
        writer.add_document(np.arange(9, 14), [5])
    files = open_tokens(str(tmp_path / "x"))
    part = TokenSlice(files, 1, 4, sequences=True)
    assert part.lengths.tolist() == [3, 2, 5]
    assert [part.read(i).tolist() for i in range(3)] == [[4, 5, 6], [7, 8], [9, 10, 11, 12, 13]]
    assert part.read(2, 1, 2).tolist() == [10, 11]
    rows = MegatronRows([TokenSource("", part)], seq_len=3, samples=20, seed=1, cache=NoCache())
    assert [_tokens(rows, n) for n in range(20)] == _slow_samples(part, 20, 3, 1)[:20]
    assert TokenSlice(files, 1, 2).read(0).tolist() == [9, 10, 11, 12, 13]
    assert part.document(2).tolist() == [9, 10, 11, 12, 13]
    assert [part.place(i) for i in (0, 2)] == [f"{tmp_path}/x: sequence {i}" for i in (1, 3)]
    with pytest.raises(IndexError, match="no document 3 among 3"):
        part.read(3)
    assert part.content_key == f"{files.content_key} sequences 1:4"
    assert TokenSlice(files, 0, 2).content_key == f"{files.content_key} documents 0:2"


def test_a_copy_maps_the_arrays_itself(tmp_path: Path) -> None:
    rows = MegatronRows([source("", [50] * 50)], seq_len=4, samples=100, seed=1, cache=IndexCache(tmp_path))
    raw = pickle.dumps(rows)
    assert len(raw) < len(pickle.dumps(rows._sources)) + 1000
    assert pickle.loads(raw).row(7)[0].tolist() == rows.row(7)[0].tolist()


def test_the_fingerprint_stays_while_the_epochs_do() -> None:
    marks = [
        MegatronRows([source("", [41, 60])], seq_len=4, samples=x, seed=1, cache=NoCache()).fingerprint
        for x in (10, 25, 26)
    ]
    assert marks[0] == marks[1] != marks[2]
    content = source("", [41, 60]).files.content_key
    assert marks[2] == {
        "order": "megatron",
        "shuffle_seed": 1,
        "sources": {"": {"content": content, "weight": 1.0, "tokens": 101, "count": 2, "separate": True}},
    }


def test_what_it_refuses() -> None:
    def make(*sources: TokenSource, seed: int = 1) -> MegatronRows:
        return MegatronRows(sources, seq_len=2, samples=5, seed=seed, cache=NoCache(), vocab_size=20)

    with pytest.raises(ConfigError) as config:
        make(source("", [9]), seed=-1)
    assert str(config.value) == "debug.seed = -1: Megatron-LM's order takes a seed from 0 to 4294967295"
    with pytest.raises(DataError) as error:
        make(source("a", [9]), source("b", [[], []]))
    assert str(error.value) == (
        "source 'b': no tokens in the documents of this split; give more documents, or another split"
    )
    with (
        patch.object(megatron_rows, "source_sizes", lambda weights, samples: [1, 1]),
        pytest.raises(DataError) as error,
    ):
        make(source("a", [3]), source("b", [99]))
    assert str(error.value) == (
        "source 'a': Megatron-LM's blend wants 3 samples of it, but its rule prepares only 1; train for other steps,"
        ' give it another weight, or set data.order = "native"'
    )
    with pytest.raises(DataError) as error:
        make(source("a", [[18, 19, 20]])).row(0)
    assert str(error.value) == (
        "source 'a', document 0, counted from 0: token ids from 18 to 20, but the model's vocabulary has 20; take the"
        " tokenizer that the files were made with, and a flavor whose vocabulary holds it"
    )
