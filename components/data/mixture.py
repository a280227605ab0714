"""The documents of one stream, mixed from its sources by quota.

Each stream is a mixture of its own, exact over every prefix, so that no number of streams, ranks or workers changes the
shares (docs/decisions/070). Its state is four integers for each source: epoch and position of the next document that
has not been taken, what has been taken so far, and the phase. The price: the next document of every source, its head,
is held encoded in every stream, since a quota asks for its length; a resume encodes the heads again.

Streams that all began at zero would take a rare source's first document at the same step, and its later ones nearly so.
So each begins at its own phase of the round, as if so much had been taken before; `phases` draws it from a sequence of
low discrepancy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import isqrt
from typing import NamedTuple

from components.data.encoding import Encoded, Encoder
from components.data.order import Deal, Document, Walk
from components.data.quota import choose
from components.runtime.errors import DataError

BARREN_EPOCHS = 16
WIDTH = 4
"""Integers that a mixture's state has of each source."""


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
    """The mixture's state before. A mixture opened there takes the document again."""
    document: Encoded


class Feed(NamedTuple):
    """One source's documents in one stream."""

    name: str
    walk: Walk
    encode: Callable[[Document], Encoded | None]
    """A document as it is packed; None if there is nothing to pack."""
    require_any: Callable[[], None] = lambda: None
    """Raises DataError if no document of the whole source can be packed."""


class Mixture:
    """The documents of one stream in the order in which they are packed, from a state on.

    `unit`: what a document counts. The first use encodes the next document of every source, each later one the
    successor of the one taken last.
    """

    def __init__(
        self, feeds: Sequence[Feed], weights: Sequence[int], unit: Callable[[Encoded], int], state: Sequence[int]
    ) -> None:
        self._feeds, self._weights, self._unit = feeds, weights, unit
        self._state = list(state)
        self._served = [taken + phase for taken, phase in zip(state[2::WIDTH], state[3::WIDTH], strict=True)]
        self._heads: list[Encoded | None] = [None for _ in feeds]
        self._lengths: list[int | None] = [None for _ in feeds]
        self._unseen: Sequence[int] = range(len(feeds))

    def state(self) -> tuple[int, ...]:
        """Of each source: epoch and position of its next document that has tokens, or of where it ended; taken; phase.

        Raises DataError.
        """
        for d in self._unseen:
            self._look(d)
        self._unseen = ()
        return tuple(self._state)

    def take(self) -> Taken | None:
        """The next document; None if all sources have ended. Raises DataError."""
        state = self.state()
        chosen = choose(self._served, self._lengths, self._weights)
        if chosen is None:
            return None
        head, length = self._heads[chosen], self._lengths[chosen]
        if head is None or length is None:
            return None
        self._heads[chosen], self._lengths[chosen], self._unseen = None, None, (chosen,)
        self._state[WIDTH * chosen + 2] += length
        self._served[chosen] += length
        return Taken(state, head)

    def _look(self, d: int) -> None:
        """Go on to the source's next document that has tokens. Raises DataError if there seems to be none."""
        name, walk, encode, require_any = self._feeds[d]
        at = WIDTH * d
        last = self._state[at]
        while True:
            try:
                document = next(walk)
            except StopIteration as end:
                self._state[at : at + 2] = end.value
                if not self._state[at + 2]:  # this stream has had nothing of it
                    require_any()
                return
            if (found := encode(document)) is not None:
                self._state[at : at + 2] = document.epoch, document.position
                self._heads[d], self._lengths[d] = found, self._unit(found)
                return
            if document.epoch > last + BARREN_EPOCHS:
                require_any()
                raise DataError(
                    f"{called(name)}: one of the streams found nothing to pack in {BARREN_EPOCHS} epochs of it, though"
                    " other documents of it can be packed; give more documents, or set data.streams lower"
                )


def called(name: str) -> str:
    """What messages call a source."""
    return f"source {name!r}" if name else "the dataset"


def phases(lengths: Sequence[int], stream: int) -> list[int]:
    """What of each source counts as taken before a stream begins: a share of its mean document's length.

    Over streams 0 to n the shares of a source are spread evenly for any n, those of two sources independently: they are
    multiples, modulo 1, of the square roots of the primes. Stream 0 begins at zero.
    """
    roots = (isqrt(prime << 128) & ((1 << 64) - 1) for prime in _primes(len(lengths)))
    return [(length * (stream * root & ((1 << 64) - 1))) >> 64 for length, root in zip(lengths, roots, strict=True)]


def _primes(number: int) -> list[int]:
    return list(islice((n for n in count(2) if all(n % d for d in range(2, isqrt(n) + 1))), number))
