"""The order of documents, and how it is dealt to streams."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytest

from components.data.documents import Read
from components.data.order import Deal, Document, Place, RandomDeal, WindowedDeal, permutation, raw_bits
from components.runtime.errors import DataError


class Numbers:
    """Documents "0", "1", ...; remembers where passes began. Random access and sequential at once."""

    def __init__(self, count: int) -> None:
        self.count, self.starts = count, list[int]()
        self.fingerprint: dict[str, Any] = {"numbers": count}

    def __len__(self) -> int:
        return self.count

    def document(self, index: int) -> str:
        return str(index)

    def records(self, start: int) -> Iterator[Read]:
        self.starts.append(start)
        return (partial(str, i) for i in range(start, self.count))


def dealt(deal: Deal, count: int) -> list[tuple[int, int, int]]:
    """The first `count` documents of the global order: (epoch, position, document), from all streams in turn."""
    streams = deal.open({s: Place(0, s) for s in range(deal.streams)})
    found: list[Document] = [next(streams[k % deal.streams]) for k in range(count)]
    return [(x.epoch, x.position, int(str(x.read()))) for x in found]


def test_bits_and_permutations_are_golden() -> None:
    assert raw_bits(1, 2, 3, 0, 2).tolist() == [13262081666550218681, 7586518172537843941]
    assert permutation(1, 0, 0, 8).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert sorted(permutation(1, 1, 0, 100)) == list(range(100))
    assert permutation(None, 3, 0, 4).tolist() == [0, 1, 2, 3]
    assert raw_bits(-1, 0, 0, 0, 1).tolist() == raw_bits((1 << 64) - 1, 0, 0, 0, 1).tolist()


@pytest.mark.parametrize("streams", [1, 4, 7, 25])
def test_streams_together_are_the_global_order(streams: int) -> None:
    order = [(e, p, int(permutation(9, e, 0, 10)[p])) for e in range(3) for p in range(10)]
    assert dealt(RandomDeal(Numbers(10), streams=streams, seed=9, epochs=None), 30) == order


@pytest.mark.parametrize("streams", [1, 4, 7, 25])
def test_windows_are_permuted_in_themselves(streams: int) -> None:
    windows = [(0, range(4)), (1, range(4, 8)), (2, range(8, 10))]
    order = [w[i] for e in range(3) for n, w in windows for i in permutation(9, e, n, len(w))]
    got = dealt(WindowedDeal(Numbers(10), streams=streams, seed=9, epochs=None, window=4), 30)
    assert got == [(k // 10, k % 10, order[k]) for k in range(30)]
    assert order[:10] != order[10:20]


def test_one_pass_serves_streams_of_any_pace() -> None:
    numbers = Numbers(1000)
    deal = WindowedDeal(numbers, streams=2, seed=None, epochs=1, window=4)
    streams = deal.open({0: Place(0, 0), 1: Place(0, 1)})
    assert [int(str(x.read())) for x in streams[1]] == list(range(1, 1000, 2))
    assert [int(str(x.read())) for x in streams[0]] == list(range(0, 1000, 2))
    assert numbers.starts == [0]


def test_resume_reads_from_the_window_of_the_stream_that_is_behind() -> None:
    numbers = Numbers(1000)
    deal = WindowedDeal(numbers, streams=3, seed=2, epochs=None, window=100)
    whole = {s: [x.read() for x in islice(it, 400)] for s, it in deal.open({s: Place(0, s) for s in range(3)}).items()}
    numbers.starts.clear()
    resumed = deal.open({1: Place(0, 901), 2: Place(0, 752)})
    assert [x.read() for x in islice(resumed[1], 50)] == whole[1][300:350]
    assert [x.read() for x in islice(resumed[2], 50)] == whole[2][250:300]
    assert numbers.starts == [700, 0]


def test_resume_in_a_later_epoch() -> None:
    for kind in (RandomDeal, partial(WindowedDeal, window=4)):
        deal: Deal = kind(Numbers(10), streams=4, seed=2, epochs=None)
        whole = list(islice(deal.open({3: Place(0, 3)})[3], 20))
        for i, document in enumerate(whole):
            rest = deal.open({3: Place(document.epoch, document.position)})[3]
            assert [x.read() for x in islice(rest, 20 - i)] == [x.read() for x in whole[i:]]


def test_an_empty_sequential_source() -> None:
    deal = WindowedDeal(Numbers(0), streams=1, seed=0, epochs=None, window=4)
    with pytest.raises(DataError) as error:
        next(deal.open({0: Place(0, 0)})[0])
    assert str(error.value) == "no documents in the dataset ({'numbers': 0}); give one that is not empty"
