"""The fast mixture against `quota.choose`, and the quotas it keeps."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.native_order import Mixture, OwnOrder, Progress, Unit
from components.data.order import named_seed, permutation
from components.data.quota import PER_DOCUMENT, choose, whole_weights

weights = st.one_of(st.integers(1, 5).map(float), st.floats(0.01, 1).map(lambda x: round(x, 3)))
sources = st.lists(
    st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any), weights, st.integers(1, 3)),
    min_size=1,
    max_size=6,
)
Sources = list[tuple[list[int], float, int]]


def _mixture(given: Sources, unit: Unit, seed: int | None, *, endless: bool = False) -> Mixture:
    orders = [
        OwnOrder(np.array(lengths), name=str(d), seed=seed, epochs=None if endless else epochs)
        for d, (lengths, _, epochs) in enumerate(given)
    ]
    return Mixture(orders, whole_weights([x[1] for x in given]), unit)


def _take(mixture: Mixture, progress: list[Progress], count: int) -> list[tuple[int, int]]:
    return list(zip(*(x.tolist() for x in mixture.take(progress, count)), strict=True))


def _slow(given: Sources, unit: Unit, seed: int | None) -> list[tuple[int, int]]:
    """One document after the other, as the rule says."""
    queues = []
    for d, (lengths, _, epochs) in enumerate(given):
        key = None if seed is None else named_seed(seed, str(d))
        queues.append([x for e in range(epochs) for x in permutation(key, e, 0, len(lengths)).tolist()])
    shares, served, found = whole_weights([x[1] for x in given]), [0] * len(given), []
    while True:
        counts = [
            (given[d][0][x[0]] if unit == "tokens" else PER_DOCUMENT) if x else None for d, x in enumerate(queues)
        ]
        d = choose(served, counts, shares)
        if d is None:
            return found
        served[d] += counts[d] or 0
        found.append((d, queues[d].pop(0)))


units = st.sampled_from(["tokens", "documents"])
seeds = st.sampled_from([None, 7])


@given(sources, units, seeds, st.lists(st.integers(0, 9), max_size=9))
@settings(max_examples=300, deadline=None)
def test_the_mixture_is_what_the_rule_chooses(given: Sources, unit: Unit, seed: int | None, steps: list[int]) -> None:
    mixture, progress = _mixture(given, unit, seed), [Progress(0, 0)] * len(given)
    found = [x for count in [*steps, 1000] for x in _take(mixture, progress, count)]
    assert found == _slow(given, unit, seed)
    assert progress == [
        (epochs * len(lengths), epochs * (sum(lengths) if unit == "tokens" else len(lengths) * PER_DOCUMENT))
        for lengths, _, epochs in given
    ]
    assert _take(mixture, progress, 5) == []


@given(sources, units)
@settings(max_examples=60, deadline=None)
def test_without_an_end_the_beginning_is_the_same(given: Sources, unit: Unit) -> None:
    mixture = _mixture(given, unit, 3, endless=True)
    longer = _take(mixture, [Progress(0, 0)] * len(given), 80)
    assert len(longer) == 80
    assert longer[:33] == _take(mixture, [Progress(0, 0)] * len(given), 33)
    often = [1 + sum(x == d for x, _ in longer) // len(given[d][0]) for d in range(len(given))]
    assert longer == _slow([(x, y, n) for (x, y, _), n in zip(given, often, strict=True)], unit, 3)[:80]


@given(sources, units)
@settings(max_examples=100, deadline=None)
def test_every_prefix_keeps_the_quotas(given: Sources, unit: Unit) -> None:
    mixture, share = _mixture(given, unit, 5, endless=True), whole_weights([x[1] for x in given])
    longest = max(map(max, (x[0] for x in given))) if unit == "tokens" else PER_DOCUMENT
    served = np.zeros(len(given), np.int64)
    for d, document in _take(mixture, [Progress(0, 0)] * len(given), 100):
        served[d] += mixture.units(d, np.array([document]))[0]
        # The error is linear within a document, so that its ends are the worst of it
        assert (np.abs(served * sum(share) - np.array(share) * served.sum()) < longest * sum(share)).all()


def test_epochs_have_orders_of_their_own() -> None:
    lengths = np.arange(1, 21)
    order = OwnOrder(lengths, name="a", seed=1, epochs=None)
    epochs = [order.documents(20 * e, 20).tolist() for e in range(3)]
    assert all(sorted(x) == list(range(20)) for x in epochs)
    assert all(x != y for x, y in pairwise(epochs))
    assert OwnOrder(lengths, name="b", seed=1, epochs=None).documents(0, 20).tolist() != epochs[0]
    assert order.documents(15, 50).tolist() == [*epochs[0], *epochs[1], *epochs[2], *order.documents(60, 5)][15:65]
    assert OwnOrder(lengths, name="a", seed=None, epochs=None).documents(18, 4).tolist() == [18, 19, 0, 1]


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_a_known_mixture(unit: Unit) -> None:
    mixture = _mixture([([4, 4, 4], 3.0, 1), ([1, 1, 1], 1.0, 1)], unit, None)
    found = [d for d, _ in _take(mixture, [Progress(0, 0)] * 2, 9)]
    assert found == {"tokens": [1, 0, 1, 0, 1, 0], "documents": [0, 1, 0, 0, 1, 1]}[unit]
