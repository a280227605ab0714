"""The order of documents, and how it is dealt to streams: document k of the global order belongs to stream k mod S.

k counts over epochs: document p of epoch e is k = e·N + p. Cursors name (e, p) rather than k, since a source without
random access learns its N only at the end of a pass. Within an epoch the order is a permutation keyed by (seed, epoch):
of all documents with random access, else of each window of `shuffle_window` documents, which is read again on resume.

A source that has a name has an order of its own, so that two sources of one length are not shuffled alike.

Permutations come from sorting the raw output of Philox: numpy keeps the bits of its bit generators stable from version
to version, but not what `Generator.permutation` makes of them.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from components.data.documents import RandomAccess, Read, Sequential, check_unchanged, place_of
from components.runtime.errors import DataError

ORDER, SYNTHETIC, FIM = 0, 1, 2  # last counter word of Philox: what the numbers are drawn for
WORD = (1 << 64) - 1


def raw_bits(seed: int, index: int, sub_index: int, purpose: int, count: int) -> np.ndarray:
    """`count` uniform 64-bit integers, a pure function of the arguments. # (count,) uint64"""
    key, counter = np.array([seed & WORD, index], np.uint64), np.array([0, 0, sub_index, purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def permutation(seed: int | None, epoch: int, window: int, count: int) -> np.ndarray:
    """Order of `count` documents; as they come if `seed` is None. # (count,) int64"""
    if seed is None:
        return np.arange(count)
    return np.argsort(raw_bits(seed, epoch, window, ORDER, count), kind="stable")


def named_seed(seed: int, name: str) -> int:
    """The seed of a source's own draws; that of the job for a source without a name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) if name else seed


class Document(NamedTuple):
    """One document in its place; `read` gives its text or raises BadRecord, `where` says in which file and line."""

    epoch: int
    position: int
    read: Read
    where: Callable[[], str]


class Place(NamedTuple):
    """Where a stream goes on: the first document of it at or after this place."""

    epoch: int
    position: int


Walk = Generator[Document, None, Place]
"""A stream's documents; returns the place that it would go on from after the last epoch."""


class Deal(Protocol):
    """Documents in order, dealt to `streams` streams."""

    streams: int
    epochs: int | None
    """Passes over the documents; None: endless."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on besides the documents, as JSON values."""
        ...

    def open(self, places: Mapping[int, Place]) -> dict[int, Walk]:
        """For each stream named, its documents from its place on, until the last epoch if there is one."""
        ...


def deal(
    documents: RandomAccess | Sequential, *, name: str, streams: int, seed: int | None, epochs: int | None, window: int
) -> Deal:
    """The deal of one source among several, or of a job's only one, which needs no name.

    `window` is for sources without random access.
    """
    own = None if seed is None else named_seed(seed, name)
    if isinstance(documents, RandomAccess):
        return RandomDeal(documents, streams=streams, seed=own, epochs=epochs, name=name)
    return WindowedDeal(documents, streams=streams, seed=own, epochs=epochs, window=window, name=name)


class RandomDeal:
    """Deal of a source with random access: each stream looks up its own documents, whatever the others do."""

    def __init__(
        self, source: RandomAccess, *, streams: int, seed: int | None, epochs: int | None, name: str = ""
    ) -> None:
        self.streams, self.epochs, self._name = streams, epochs, name
        self._source, self._seed = source, seed
        self._orders: dict[int, np.ndarray] = {}
        self.fingerprint: dict[str, Any] = {"streams": streams, "shuffle_seed": seed}

    def open(self, places: Mapping[int, Place]) -> dict[int, Walk]:
        """See Deal."""
        return {stream: self._walk(*place) for stream, place in places.items()}

    def _walk(self, epoch: int, position: int) -> Walk:
        count = len(self._source)
        if not count:
            raise _empty(self._source, self._name)
        while self.epochs is None or epoch < self.epochs:
            while position < count:
                index = int(self._order(epoch)[position])
                where = partial(place_of, self._source, index)
                yield Document(epoch, position, partial(self._source.document, index), where)
                position += self.streams
            epoch, position = epoch + 1, position - count
        return Place(epoch, position)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:  # streams are seldom more than one epoch apart
                del self._orders[old]
            check_unchanged(self._source)
            self._orders[epoch] = permutation(self._seed, epoch, 0, len(self._source))
        return self._orders[epoch]


class WindowedDeal:
    """Deal of a sequential source: one reader for all streams of this process.

    The reader goes on when a stream runs dry, and keeps the unparsed records of the streams that are behind. Streams
    drift apart like a random walk, so a few thousand records at most are kept; going back for them would mean a whole
    new pass.
    """

    def __init__(
        self, source: Sequential, *, streams: int, seed: int | None, epochs: int | None, window: int, name: str = ""
    ) -> None:
        self.streams, self.epochs, self._name = streams, epochs, name
        self._source, self._seed = source, seed
        self._window = 1 if seed is None else window
        self.fingerprint: dict[str, Any] = {"streams": streams, "shuffle_seed": seed, "shuffle_window": self._window}

    def open(self, places: Mapping[int, Place]) -> dict[int, Walk]:
        """See Deal."""
        queues: dict[int, deque[Document]] = {stream: deque() for stream in places}
        ends: dict[int, Place] = {}
        reader = self._read(places, ends)
        return {stream: self._walk(queues, stream, reader, ends) for stream in places}

    def _walk(
        self,
        queues: dict[int, deque[Document]],
        stream: int,
        reader: Iterator[tuple[int, Document]],
        ends: dict[int, Place],
    ) -> Walk:
        while True:
            while not queues[stream]:
                item = next(reader, None)
                if item is None:
                    return ends[stream]
                queues[item[0]].append(item[1])
            yield queues[stream].popleft()

    def _read(self, places: Mapping[int, Place], ends: dict[int, Place]) -> Iterator[tuple[int, Document]]:
        """Documents of the named streams with their streams, from the earliest place on; then fills `ends`."""
        stream, (epoch, position) = min(places.items(), key=lambda x: x[1])
        shift = stream - position  # documents in all epochs before this one, modulo streams
        start = position // self._window * self._window
        while self.epochs is None or epoch < self.epochs:
            count = start
            for record in self._pass(epoch, start):
                stream = (count + shift) % self.streams
                if stream in places and places[stream] <= (epoch, count):
                    yield stream, Document(epoch, count, record, partial(place_of, record, count))
                count += 1
            if count > start:
                epoch, start, shift = epoch + 1, 0, (shift + count) % self.streams
            elif start:  # the place lies beyond the end, as with more streams than documents: count from the beginning
                start = 0
            else:
                raise _empty(self._source, self._name)
        for stream, place in places.items():
            ends[stream] = place if place.epoch >= epoch else Place(epoch, (stream - shift) % self.streams)

    def _pass(self, epoch: int, start: int) -> Iterator[Read]:
        """Records of one epoch in its order, from position `start` on, which is the beginning of a window."""
        records = self._source.records(start)
        for number in range(start // self._window, 1 << 62):
            window = list(islice(records, self._window))
            yield from (window[i] for i in permutation(self._seed, epoch, number, len(window)))
            if len(window) < self._window:
                return


def _empty(source: RandomAccess | Sequential, name: str) -> DataError:
    where = f"source {name!r}: no documents in it" if name else "no documents in the dataset"
    return DataError(f"{where} ({source.fingerprint}); give one that is not empty")
