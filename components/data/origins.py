"""Where the documents of a row come from: told by row sources to whoever asks, apart from the rows.

A batch says where documents begin, not which they are: that would be a tensor of every step that nothing trains on. So
a row source that can tell has a listener, which nobody sets but a tool that looks at rows in its own process.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Origin(NamedTuple):
    """A document, and the part of it that a row holds."""

    source: str
    """Name of the source."""
    where: str
    """`file:line`, or what else its source can say."""
    offset: int
    """The part's first token in the document, begin token included."""
    length: int
    """Tokens of the whole document, begin and end tokens included."""

    def later(self, tokens: int) -> "Origin":
        """The part that begins so many tokens after this one's begin."""
        return self._replace(offset=self.offset + tokens)


Listener = Callable[[Sequence[Origin] | None], None]
"""Takes the documents of a row, in order and without padding; the last may be only a label in it. None: not known."""


@runtime_checkable
class Traced(Protocol):
    """A row source that can tell."""

    listener: Listener | None
    """Called just before a row is given."""


@runtime_checkable
class TracedIndex(Protocol):
    """A RowIndex that can tell."""

    def origins(self, n: int) -> list[Origin]:
        """The documents of row n."""
        ...
