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


@runtime_checkable
class Traced(Protocol):
    """A row source that can tell."""

    listener: Callable[[Sequence[Origin]], None] | None
    """Called with the documents of each row, in order and without padding, just before the row is given."""
