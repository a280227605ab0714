"""The documents of one stream, mixed from its sources by quota.

Each stream is a mixture of its own, exact over every prefix, so that no number of streams, ranks or workers changes the
shares (docs/decisions/070). Its state is three integers for each source: epoch and position of the next document that
has not been taken, and what has been taken so far. The price: the next document of every source, its head, is held
encoded in every stream, since a quota asks for its length; a resume encodes the heads again.

Streams that all began at zero would take a rare source's first document at the same step, and its later ones nearly so.
So each begins at its own phase of the round, which `begin` draws from a sequence of low discrepancy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from math import isqrt
from typing import NamedTuple

from components.data.encoding import Encoded, Encoder
from components.data.order import Deal, Document, Place, Walk
from components.data.quota import choose
from components.runtime.errors import DataError

BARREN_EPOCHS = 16


@dataclass(frozen=True)
class StreamSource:
    """One source of streamed rows."""

    name: str
    """How reports and messages call it; the order is keyed by the deal."""
    deal: Deal
    """Its documents, in order, dealt to as many streams as those of the others."""
    encoder: Encoder
    """Makes tokens of them."""
    weight: float = 1.0
    """Share in the mixture, relative to the other sources'."""


class Taken(NamedTuple):
    """A document that was taken from a mixture."""

    state: tuple[int, ...]
    """The mixture's state before: (epoch, position, served) of each source. A mixture opened there takes it again."""
    document: Encoded


class Feed:
    """One source's documents in one stream, of which the next is looked at before it is taken."""

    def __init__(
        self, name: str, walk: Walk, encode: Callable[[Document], Encoded | None], place: Place, served: int
    ) -> None:
        self._name, self._walk, self._encode = name, walk, encode
        self._ended = False
        self._head: Encoded | None = None
        self.place, self.served = place, served

    def head(self) -> Encoded | None:
        """The next document that has tokens; None after the last. `place` is then its, or where the source ended."""
        while self._head is None and not self._ended:
            try:
                self._look_at(next(self._walk))
            except StopIteration as end:
                self.place, self._ended = end.value, True
        return self._head

    def take(self, units: int) -> None:
        """Count the head as served."""
        self._head = None
        self.served += units

    def _look_at(self, document: Document) -> None:
        found = self._encode(document)
        if found is not None:
            self._head, self.place = found, Place(document.epoch, document.position)
        elif document.epoch > self.place.epoch + BARREN_EPOCHS:
            of = f" of source {self._name!r}" if self._name else ""
            raise DataError(
                f"a stream found no text in {BARREN_EPOCHS} epochs{of}; give more documents, or set data.streams lower"
            )


class Mixture:
    """The documents of one stream in the order in which they are packed. `unit`: what a document counts."""

    def __init__(self, feeds: Sequence[Feed], weights: Sequence[int], unit: Callable[[Encoded], int]) -> None:
        self._feeds, self._weights, self._unit = feeds, weights, unit

    def state(self) -> tuple[int, ...]:
        """(epoch, position, served) of each source: what it goes on from. Encodes the heads that are missing."""
        for feed in self._feeds:
            feed.head()
        return tuple(chain.from_iterable((*x.place, x.served) for x in self._feeds))

    def take(self) -> Taken | None:
        """The next document; None if all sources have ended. Raises DataError."""
        state = self.state()
        heads = [x.head() for x in self._feeds]
        lengths = [None if x is None else self._unit(x) for x in heads]
        chosen = choose([x.served for x in self._feeds], lengths, self._weights)
        head, units = (None, None) if chosen is None else (heads[chosen], lengths[chosen])
        if chosen is None or head is None or units is None:
            return None
        self._feeds[chosen].take(units)
        return Taken(state, head)


def begin(lengths: Sequence[int], stream: int) -> list[int]:
    """What each source counts as served when a stream begins: a share of its mean document's length.

    Over streams 0 to n the shares of a source are spread evenly for any n, those of two sources independently: they are
    multiples, modulo 1, of the square roots of the primes. Stream 0 begins at zero.
    """
    roots = (isqrt(prime << 128) & ((1 << 64) - 1) for prime in _primes(len(lengths)))
    return [(length * (stream * root & ((1 << 64) - 1))) >> 64 for length, root in zip(lengths, roots, strict=True)]


def _primes(number: int) -> list[int]:
    return list(islice((n for n in count(2) if all(n % d for d in range(2, isqrt(n) + 1))), number))
