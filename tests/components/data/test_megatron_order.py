"""Megatron-LM's indices: the reference's goldens, and equality with slow and obvious versions."""

from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import megatron_order
from components.data.megatron_order import (
    blend,
    blend_all,
    document_index,
    epochs_needed,
    epochs_of,
    normalized,
    sample_index,
    separate_final_epoch,
    shuffle_index,
    source_indices,
    source_sizes,
)
from components.runtime.errors import DataError


def test_sample_index_golden() -> None:
    found = sample_index(np.array([4, 3, 5]), np.array([2, 0, 1], np.int32), 4)
    assert found.tolist() == [[0, 0], [0, 4], [1, 3]]
    assert found.dtype == np.int32


def test_document_and_shuffle_golden() -> None:
    state = np.random.RandomState(1234)
    documents = document_index(6, 2, state, separate=True)
    assert documents.tolist() == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    assert documents.dtype == np.int32
    shuffle = shuffle_index(5, 8, state)
    assert shuffle.tolist() == [1, 3, 2, 0, 4, 6, 5, 7]
    assert shuffle.dtype == np.uint32


def test_documents_of_all_epochs_are_shuffled_together() -> None:
    documents = document_index(6, 3, np.random.RandomState(1), separate=False)
    assert np.bincount(documents).tolist() == [3] * 6
    assert sorted(documents[:6].tolist()) != list(range(6))


def test_a_shuffle_without_a_rest_draws_no_more() -> None:
    state, expected = np.random.RandomState(7), np.random.RandomState(7)
    order = np.arange(9, dtype=np.uint32)
    expected.shuffle(order)
    assert shuffle_index(9, 9, state).tolist() == order.tolist()
    assert state.randint(1 << 30) == expected.randint(1 << 30)


@pytest.mark.parametrize(("tokens", "samples", "epochs"), [(10, 2, 1), (9, 2, 1), (8, 2, 2), (3, 100, 134), (8, 0, 1)])
def test_epochs_needed(tokens: int, samples: int, epochs: int) -> None:
    assert epochs_needed(tokens, samples, 4) == epochs


def test_no_tokens() -> None:
    with pytest.raises(DataError) as error:
        epochs_of(np.zeros(3, np.int64), 5, 4)
    assert str(error.value) == "no tokens in the documents of this split; give more documents, or another split"


def test_the_last_epoch_is_apart_below_four_fifths() -> None:
    # 101 tokens are 25 samples an epoch, so 20 is the bound
    assert [separate_final_epoch(101, 2, 25 + x, 4) for x in (0, 19, 20, 25)] == [True, True, False, False]
    assert not separate_final_epoch(101, 1, 3, 4)


def test_indices_of_a_source() -> None:
    lengths = np.array([4, 3, 5, 0, 9, 2])
    epochs = epochs_of(lengths, 7, 4)  # 5 samples in the first, 2 of 5 in the last
    assert epochs == (23, 2, True)
    found = source_indices(lengths, epochs, 4, 1234)
    assert found.documents.tolist() == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    assert len(found.samples) - 1 == 11
    assert sorted(found.shuffle[:5].tolist()) == list(range(5))
    assert sorted(found.shuffle[5:].tolist()) == list(range(5, 11))


documents_of_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def _slow_sample_index(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Walks token by token; a row starts at the last label of the row before."""
    places = [[d, i] for d, length in enumerate(lengths) for i in range(length)]
    rows = [[0, 0]]
    while len(rows) * seq_len < len(places):
        rows.append(places[len(rows) * seq_len])
    return rows


@given(documents_of_lengths, st.integers(1, 12), st.randoms())
@settings(max_examples=200, deadline=None)
def test_sample_index_is_the_slow_one(lengths: list[int], seq_len: int, rng: Random) -> None:
    order = list(range(len(lengths))) * 2
    rng.shuffle(order)
    found = sample_index(np.array(lengths), np.array(order, np.int32), seq_len)
    assert found.tolist() == _slow_sample_index([lengths[d] for d in order], seq_len)


def test_sample_index_of_huge_documents() -> None:
    found = sample_index(np.array([1 << 33]), np.array([0], np.int32), 1 << 31)
    assert found.dtype == np.int64
    assert found.tolist() == [[0, i << 31] for i in range(4)]


def test_blend_goldens() -> None:
    assert blend([0.5, 0.3, 0.2], 10).sources.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert blend([0.01, 0.99], 5).sources.tolist() == [1, 0, 1, 1, 1]
    assert blend_all([3, 1, 2]).sources.tolist() == [0, 2, 1, 0, 2, 0]
    found = blend([2, 6], 4)
    assert [x.dtype for x in found] == [np.int16, np.int64]
    assert found.samples.tolist() == [0, 0, 1, 2]


def _slow_blend(shares: list[float], sizes: list[float], samples: int) -> tuple[list[int], list[int]]:
    counts, sources, numbers = [0] * len(shares), [], []
    for i in range(samples):
        best, most = -1, 0.0
        for d, share in enumerate(shares):
            behind = share * max(float(i), 1.0) - float(counts[d])
            if counts[d] < sizes[d] and (best < 0 or behind > most):
                best, most = d, behind
        sources.append(best)
        numbers.append(counts[best])
        counts[best] += 1
    return sources, numbers


some_weights = st.one_of(
    st.lists(st.integers(1, 4).map(float), min_size=1, max_size=7),  # ties
    st.lists(st.floats(0.001, 1), min_size=1, max_size=7),
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7]), min_size=1, max_size=7),
)


@given(some_weights, st.integers(0, 3000))
@settings(max_examples=80, deadline=None)
def test_blend_is_the_slow_one(weights: list[float], samples: int) -> None:
    shares = normalized(normalized(weights))
    found = blend(weights, samples)
    assert (found.sources.tolist(), found.samples.tolist()) == _slow_blend(shares, [samples] * len(shares), samples)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_exhaustive_blend_is_the_slow_one(sizes: list[int]) -> None:
    total = sum(sizes)
    found = blend_all(sizes)
    slow = _slow_blend([x / max(total, 1) for x in sizes], list(map(float, sizes)), total)
    assert (found.sources.tolist(), found.samples.tolist()) == slow


def test_a_wrong_guess_costs_only_time() -> None:
    weights = [0.31, 0.2, 0.2, 0.29]
    expected = blend(weights, 3000).sources
    with patch.object(megatron_order, "_guess", lambda w, c, further: np.zeros((len(further), len(w)))):
        assert blend(weights, 3000).sources.tolist() == expected.tolist()


def test_sizes_have_a_surplus() -> None:
    assert source_sizes([3, 1], 1000) == [754, 252]  # 750 and 250 times 1.005, rounded up
    assert source_sizes([1, 1, 1], 10, surplus=0.0) == [4, 4, 4]


def test_too_many_sources() -> None:
    with pytest.raises(DataError) as error:
        blend([1.0] * 32768, 1)
    assert str(error.value) == "32768 sources in one blend; at most 32767 are allowed"
