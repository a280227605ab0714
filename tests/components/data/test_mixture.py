"""Several sources in one stream: quotas at every moment, phases, ends, and what is told of them."""

from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.documents import MEND, BadRecord, Record
from components.data.encoding import Encoded, Seat, TokensEncoder, Where
from components.data.indexed import IndexedRows, SyntheticRows
from components.data.loader import Loader
from components.data.mixture import Feed, Mixture, StreamSource, phases
from components.data.order import Deal, Document, Place, RandomDeal, Walk, WindowedDeal, deal, named_seed
from components.data.packing import Packing
from components.data.quota import PER_DOCUMENT, choose, whole_weights
from components.data.rows import Ending
from components.data.streamed import StreamedRows
from components.runtime.errors import DataError
from tests.components.data.corpus import Numbered, loaders, run, streamed
from tests.components.data.test_order import Numbers

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=7)


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 50, 3000]), WEIGHTS)
def test_over_every_prefix_the_error_is_below_the_longest_document(seed: int, most: int, weights: list[int]) -> None:
    lengths = Random(seed)
    heads: list[int | None] = [lengths.randint(1, most) for _ in weights]
    served, longest = [0] * len(weights), max(x for x in heads if x)
    for _ in range(150):
        chosen = choose(served, heads, weights)
        assert chosen is not None
        served[chosen] += heads[chosen] or 0
        heads[chosen] = lengths.randint(1, most) if lengths.random() < 0.9 else most
        longest = max(longest, heads[chosen] or 0)
        for got, weight in zip(served, weights, strict=True):
            assert abs(got * sum(weights) - weight * sum(served)) < longest * sum(weights)


@settings(deadline=None)
@given(WEIGHTS)
def test_documents_are_within_one_of_their_share(weights: list[int]) -> None:
    served = [0] * len(weights)
    for count in range(1, 150):
        chosen = choose(served, [1] * len(weights), weights)
        assert chosen is not None
        served[chosen] += 1
        assert all(abs(got * sum(weights) - w * count) < sum(weights) for got, w in zip(served, weights, strict=True))


def test_who_comes_next() -> None:
    assert choose([], [], []) is None
    assert choose([5], [None], [1]) is None
    assert choose([5, 9], [3, None], [1, 1]) == 0
    assert choose([5, 9, 1], [None, None, None], [1, 1, 1]) is None
    assert choose([0, 0], [10, 4], [1, 1]) == 1
    assert choose([0, 4], [10, 4], [1, 1]) == 0  # the other is ahead of its share
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([1, 2.5]) == [2, 5]


def rows(
    lengths: dict[str, list[int]], weights: list[float], *, streams: int, epochs: dict[str, int] | None = None,
    unit: Any = "tokens", ending: Ending = "repeat", seq_len: int = 16, seed: int | None = 3, **packing: Any,
) -> StreamedRows:  # fmt: skip
    """Sources whose tokens tell document and place, the second's from 100,000 on, and so on."""
    limit = None if ending == "repeat" else 1

    def source(number: int, name: str) -> StreamSource:
        documents = Numbered(lengths[name])
        dealt = deal(documents, name=name, streams=streams, seed=seed, epochs=(epochs or {}).get(name, limit), window=9)
        return StreamSource(name, dealt, Shifted(100_000 * number), weights[number])

    return StreamedRows(
        [source(i, x) for i, x in enumerate(lengths)],
        Packing(seq_len, **packing),
        unit=unit,
        ending=ending,
        skip_bad=False,
        fingerprint={},
    )


class Shifted(TokensEncoder):
    """Adds a number to each token."""

    def __init__(self, by: int) -> None:
        super().__init__(1 << 40)
        self._by = by

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        return Encoded(super().encode(record, where, seat).tokens + self._by, None)


LENGTHS = {"a": [7, 3, 12, 5, 9] * 8, "b": [40, 22, 31] * 6, "c": [2, 1, 4] * 9}


@pytest.mark.parametrize("streams", [1, 5])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "padded"])
def test_each_stream_is_an_exact_mixture(streams: int, packing: str) -> None:
    (loader,) = loaders(rows(LENGTHS, [0.6, 0.3, 0.1], streams=streams, kind=packing), streams, 1)
    bound = 40 if streams == 1 else 2 * 40  # a start within a document may add another's length
    for _, table in run([loader], 150):
        for cursor in table:
            served = cursor[3::4]
            errors = [got - sum(served) * w for got, w in zip(served, (0.6, 0.3, 0.1), strict=True)]
            assert max(map(abs, errors)) < bound
    assert min(sum(x[i] for x in table) for i in (3, 7, 11)) > 0


def test_documents_as_the_unit() -> None:
    (loader,) = loaders(rows(LENGTHS, [0.5, 0.25, 0.25], streams=1, unit="documents", kind="padded"), 1, 1)
    seen: Counter[int] = Counter()
    for batch, table in run([loader], 200):
        seen[int(batch[0, 0, 0]) // 100_000] += int(table[0][0] == 0)  # a long document's last row
        total = sum(seen.values())
        assert all(abs(seen[i] - total * w) < 1 for i, w in enumerate((0.5, 0.25, 0.25)))
        assert table[0][3::4] == [seen[i] * PER_DOCUMENT for i in range(3)]
        assert loader.mixture(table) == dict(zip("abc", (seen[i] for i in range(3)), strict=True))


def test_phases_are_even_over_streams() -> None:
    assert phases([100, 100, 1000], 0) == [0, 0, 0]
    assert phases([100, 100, 1000], 1) == [41, 73, 236]
    for source in range(4):
        for count in (5, 16, 100, 1000):
            shares = sorted(phases([1 << 30] * 4, s)[source] / (1 << 30) for s in range(count))
            assert max(abs(x - i / count) for i, x in enumerate(shares)) < 3.5 * np.log2(count + 1) / count / 2


def test_streams_do_not_take_the_rare_source_all_at_once() -> None:
    """Of a source with a twentieth of the tokens, each batch has about that."""
    lengths = {"a": [50] * 500, "b": [200] * 500}
    (loader,) = loaders(rows(lengths, [0.95, 0.05], streams=32, seq_len=100), 32, 1)
    shares = [float((batch[:, 0] >= 100_000).double().mean()) for batch, _ in run([loader], 120)]
    means = np.array(shares).reshape(-1, 10).mean(1)  # of 32,000 tokens each
    assert 0.03 < means.min() < means.max() < 0.07
    source = rows(lengths, [0.95, 0.05], streams=32, seq_len=100)
    source._begun = [(0, 0, s, 0, 0, 0, s, 0, 0) for s in range(32)]
    (loader,) = loaders(source, 32, 1)
    at_once = [float((batch[:, 0] >= 100_000).double().mean()) for batch, _ in run([loader], 20)]
    assert max(at_once) == 1  # what phases are for
    assert max(shares) < 0.2


def test_one_source_or_one_stream_begins_at_zero() -> None:
    assert rows({"a": [5] * 9}, [1], streams=4).start() == [(0, 0, s, 0, 0) for s in range(4)]
    assert rows(LENGTHS, [1, 1, 1], streams=1).start() == [(0,) * 13]
    assert rows(LENGTHS, [1, 1, 1], streams=2).start()[0] == (0,) * 13
    assert rows(LENGTHS, [1, 1, 1], streams=2, seed=None).start()[1][4::4] == tuple(phases([7, 31, 2], 1))


def test_a_source_with_a_name_has_an_order_of_its_own() -> None:
    documents = Numbered([1] * 50)

    def order(name: str) -> list[int]:
        walk = deal(documents, name=name, streams=1, seed=5, epochs=1, window=1).open({0: Place(0, 0)})[0]
        return [int(np.asarray(x.read())[0]) // 100 for x in walk]

    assert order("") == [int(np.asarray(x.read())[0]) // 100 for x in _unnamed(documents)]
    assert order("a") != order("") != order("b") != order("a")
    assert named_seed(5, "") == 5
    assert named_seed(5, "a") == 1600595082476555100
    assert named_seed(6, "a") != named_seed(5, "a")


def _unnamed(documents: Numbered) -> Any:
    return RandomDeal(documents, streams=1, seed=5, epochs=1).open({0: Place(0, 0)})[0]


def test_a_source_leaves_when_its_epochs_are_spent() -> None:
    source = rows({"a": [8] * 10, "b": [8] * 3}, [1, 1], streams=1, epochs={"b": 2}, kind="padded")
    assert not source.ends
    (loader,) = loaders(source, 1, 1)
    of = [int(batch[0, 0, 0]) >= 100_000 for batch, _ in run([loader], 40)]
    assert of[:12] == [False, True] * 6
    assert not any(of[12:])


def test_data_end_when_all_sources_have() -> None:
    epochs = {"a": 1, "b": 3}
    source = rows({"a": [8] * 10, "b": [8] * 3}, [1, 1], streams=1, epochs=epochs, kind="padded")
    assert source.ends
    (loader,) = loaders(source, 1, 1)
    assert loader.ends
    steps = list(run([loader]))
    assert len(steps) == 10 + 9
    assert steps[-1][1] == [[0, 1, 0, 80, 0, 3, 0, 72, 0]]
    assert loader.mixture(steps[-1][1]) == {"a": 80, "b": 72}
    again = rows({"a": [8] * 10, "b": [8] * 3}, [1, 1], streams=1, epochs={"b": 4}, kind="padded")
    (more,) = loaders(again, 1, 1)
    more.load_state(loader.state_dict(steps[-1][1]))
    assert [int(x[0, 0, 0]) >= 100_000 for x, _ in run([more], 6)] == [True, False] * 3


def exhausted(walk: Walk) -> tuple[list[Document], Place]:
    """All documents, and what the walk returns."""
    taken: list[Document] = []
    while True:
        try:
            taken.append(next(walk))
        except StopIteration as end:
            return taken, end.value


@pytest.mark.parametrize("streams", [1, 4, 30])
def test_a_walk_returns_where_it_would_go_on(streams: int) -> None:
    documents = Numbered([1] * 23)
    for limited, endless in (
        [RandomDeal(documents, streams=streams, seed=4, epochs=e) for e in (2, None)],
        [WindowedDeal(Numbers(23), streams=streams, seed=4, epochs=e, window=5) for e in (2, None)],
    ):
        for s, walk in limited.open({s: Place(0, s) for s in range(streams)}).items():
            taken, place = exhausted(walk)
            rest = next(endless.open({s: place})[s])
            whole = list(islice(endless.open({s: Place(0, s)})[s], len(taken) + 1))
            assert (rest.epoch, rest.position) == (whole[-1].epoch, whole[-1].position)
            assert list(limited.open({s: place})[s]) == []


def test_what_has_been_served() -> None:
    source = rows(LENGTHS, [0.6, 0.3, 0.1], streams=4)
    (loader,) = loaders(source, 3, 1)  # one stream has not begun
    assert loader.mixture([]) == {}
    assert loader.mixture(source.start()) == {"a": 0, "b": 0, "c": 0}
    *_, (_, table) = run([loader], 60)
    got = loader.mixture(table)
    assert got == {"a": sum(x[3] for x in table), "b": sum(x[7] for x in table), "c": sum(x[11] for x in table)}
    assert abs(sum(got.values()) - 3 * 60 * 16) < 3 * 40
    assert loaders(IndexedRows(Two(), global_batch=2, document_mask=False, ending="stop"), 2, 1)[0].mixture(
        [[6], [7]]
    ) == {"x": 96}
    index = SyntheticRows(1, 9, 16)
    assert IndexedRows(index, global_batch=2, document_mask=False, ending="stop").mixture([[6]]) == {}
    assert not IndexedRows(index, global_batch=2, document_mask=False, ending="stop").ends


class Two(SyntheticRows):
    """Knows what it takes from where."""

    count = 10

    def __init__(self) -> None:
        super().__init__(1, 9, 16)

    def mixture(self, rows: int) -> dict[str, int]:
        return {"x": 16 * rows}


def test_a_loaded_state_needs_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = loaders(rows(LENGTHS, [1, 1, 1], streams=2), 2, 1)
    state = first.state_dict([])
    source = rows(LENGTHS, [1, 1, 1], streams=2)
    monkeypatch.setattr(source, "start", lambda: pytest.fail("the start was asked for"))
    loader = Loader(source, global_batch=2, data_rank=0, data_degree=1, dataloader=first._settings)
    loader.load_state(state)
    assert torch.equal(next(iter(loader)).batch.tokens, next(iter(first)).batch.tokens)


def test_a_table_of_other_sources_is_refused() -> None:
    with pytest.raises(DataError) as error:
        rows(LENGTHS, [1, 1, 1], streams=2).resume([[0] * 5] * 2)
    assert str(error.value) == (
        "the saved loader state has cursors of 5 numbers, this job of 13, as many as its sources ask for;"
        " give the sources that the state was saved with"
    )


def test_a_source_without_text_is_named() -> None:
    source = rows({"a": [3] * 5, "b": [0] * 5}, [1, 1], streams=1)
    with pytest.raises(DataError) as error:
        next(iter(loaders(source, 1, 1)[0]))
    message = (
        "source 'b': all its 5 documents were dropped, 5 of them since they are empty; give documents with text in"
    )
    assert str(error.value) == f"{message} them"
    with pytest.raises(DataError) as error:
        next(iter(loaders(rows({"a": []}, [1], streams=1), 1, 1)[0]))
    assert str(error.value) == "source 'a': no documents in it ({'lengths': []}); give one that is not empty"


class Poor(Numbered):
    """Of every three documents two cannot be read."""

    def document(self, index: int) -> np.ndarray:
        if index % 3:
            raise BadRecord(f"x:{index + 1}: bad; {MEND}")
        return super().document(index)


WHY = {
    "bad": "{n} of them since they cannot be read (the first: x:2: bad); mend them, or give other documents",
    "drop": '{n} of them since they are longer than a row of 16 tokens (data.long_documents = "drop"); raise'
    " training.seq_len, or have such documents cut by another data.long_documents",
}


@pytest.mark.parametrize("ending", ["repeat", "stop"])
@pytest.mark.parametrize("why", ["bad", "drop"])
def test_a_source_whose_documents_are_all_dropped_is_named(ending: Ending, why: str) -> None:
    """By the stream that finds it first, with the most common reason; however many streams there are."""
    other = StreamSource("good", dealt_of(Numbered([9] * 20), "good", 4, ending), TokensEncoder(1 << 20))
    count, most = (3, 2) if why == "bad" else (5, 3)
    documents = Poor([0] * count) if why == "bad" else Numbered([40, 40, 0, 40, 0])
    poor = StreamSource("poor", dealt_of(documents, "poor", 4, ending), TokensEncoder(1 << 20))
    source = StreamedRows(
        [other, poor], Packing(16, kind="padded", long_documents="drop"), ending=ending, skip_bad=True, fingerprint={}
    )
    with pytest.raises(DataError) as error:
        list(run(loaders(source, 4, 1), 40))
    told = f"source 'poor': all its {count} documents were dropped, " + WHY[why].format(n=most)
    assert str(error.value) == told


def dealt_of(documents: Numbered, name: str, streams: int, ending: Ending) -> Deal:
    return deal(documents, name=name, streams=streams, seed=1, epochs=None if ending == "repeat" else 1, window=1)


def test_held_out_documents_that_are_all_dropped_are_no_error() -> None:
    source = streamed(Poor([0] * 3), streams=2, ending="pad", encoder=TokensEncoder(9), skip_bad=True)
    (loader,) = loaders(source, 2, 1)
    for _ in range(2):
        assert list(run([loader])) == []
        assert (loader.skipped(), loader.report()["row_tokens"]) == ({"": 2}, 0)


def test_a_mean_is_of_what_can_be_read() -> None:
    """A record that cannot be read is told by its stream, not by the estimate before the first step."""

    class Broken(Numbered):
        def document(self, index: int) -> np.ndarray:
            if index == 3:
                raise BadRecord("x:4: bad")
            return super().document(index)

    dealt = deal(Broken([5] * 20), name="a", streams=2, seed=None, epochs=None, window=1)
    other = deal(Numbered([9] * 20), name="b", streams=2, seed=None, epochs=None, window=1)
    encoder = TokensEncoder(1 << 20)
    source = StreamedRows(
        [StreamSource("a", dealt, encoder), StreamSource("b", other, encoder)],
        Packing(16),
        ending="repeat",
        skip_bad=True,
        fingerprint={},
    )
    assert source.start()[1][4::4] == tuple(phases([5, 9], 1))
    assert sum(source.counts.skipped.values()) == 0
    list(run(loaders(source, 2, 1), 3))
    assert source.counts.skipped == {"a": 1, "b": 0}


def test_a_mixture_goes_on_from_its_state() -> None:
    def mixture(state: tuple[int, ...]) -> Mixture:
        walk = RandomDeal(Numbered([3, 0, 5]), streams=1, seed=None, epochs=1)
        feed = Feed("", walk.open({0: Place(state[0], state[1])})[0], encode)
        return Mixture([feed], [1], lambda x: len(x.tokens), state)

    def encode(document: Any) -> Encoded | None:
        tokens = document.read()
        return Encoded(tokens, None) if len(tokens) else None

    whole = mixture((0, 0, 0, 0))
    first, second = whole.take(), whole.take()
    assert first is not None
    assert second is not None
    assert (first.state, second.state, whole.state()) == ((0, 0, 0, 0), (0, 2, 3, 0), (1, 0, 8, 0))
    assert whole.take() is None
    again = mixture(second.state).take()
    assert again is not None
    assert again.document.tokens.tolist() == second.document.tokens.tolist() == [200, 201, 202, 203, 204]
