"""Links: which elements of our tensors are which elements of theirs; what the rules of `names` become.

A link joins two boxes of as many elements, in the same order but for a transposition of the last two dimensions, rows
of which may lie some steps apart. Cutting a link by any box gives a link, which is all that import and export need to
know of a table, whatever the layout. Torch-free.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

T = TypeVar("T")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Span:
    """Indices along one dimension: `count` of them from `start` on, `step` apart."""

    start: int
    count: int
    step: int = 1

    @property
    def slice(self) -> slice:
        """The same as a slice."""
        return slice(self.start, self.start + self.step * (self.count - 1) + 1, self.step)

    def range(self, first: int, count: int) -> "Span":
        """`count` of its indices, from the `first` one on."""
        return Span(self.start + self.step * first, count, self.step)


Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Link:
    """The elements of a box of ours are those of a box of theirs, in the same order unless `transposed`."""

    ours: str
    """Our tensor."""
    theirs: str
    """Their tensor."""
    our_part: tuple[Span, ...]
    """One for each dimension of ours."""
    their_part: tuple[Span, ...]
    """One for each dimension of theirs. Ours may have more in front, with a count of 1: which expert it is."""

    transposed: bool = False
    """Their last two dimensions are ours the other way round."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(span.count for span in self.our_part)

    def across(self, dim: int) -> int:
        """Which dimension of theirs goes along with that one of ours; negative for those that only ours have."""
        last = len(self.our_part) - 1
        if self.transposed and dim >= last - 1:
            dim = 2 * last - 1 - dim
        return dim - (len(self.our_part) - len(self.their_part))

    def cut(self, dim: int, first: int, count: int) -> "Link":
        """Of our dimension `dim` only `count` of its indices, from the `first` one on."""
        ours, theirs = [*self.our_part], [*self.their_part]
        ours[dim] = ours[dim].range(first, count)
        if (across := self.across(dim)) >= 0:
            theirs[across] = theirs[across].range(first, count)
        return replace(self, our_part=tuple(ours), their_part=tuple(theirs))

    def within(self, offsets: Shape, sizes: Shape) -> "Link | None":
        """What of it lies in a box of our tensor; our part then counts from the box. None for nothing."""
        link = self
        for dim, (span, offset, size) in enumerate(zip(self.our_part, offsets, sizes, strict=True)):
            first = max(0, -((span.start - offset) // span.step))  # rounded up
            last = min(span.count, -((span.start - offset - size) // span.step))
            if last <= first:
                return None
            link = link.cut(dim, first, last - first)
        moved = (replace(span, start=span.start - at) for span, at in zip(link.our_part, offsets, strict=True))
        return replace(link, our_part=tuple(moved))


def whole(shape: Shape) -> tuple[Span, ...]:
    """All of a tensor."""
    return tuple(Span(0, size) for size in shape)


def part(shape: Shape, dim: int, start: int, count: int) -> tuple[Span, ...]:
    """A range of one dimension, all of the others."""
    return tuple(Span(start, count) if at == dim else Span(0, size) for at, size in enumerate(shape))


def swapped(parts: tuple[T, ...]) -> tuple[T, ...]:
    """Something for each dimension, with the last two the other way round."""
    return (*parts[:-2], parts[-1], parts[-2])


def resized(shape: Shape, dim: int, size: int) -> Shape:
    """The shape with another length of one dimension."""
    return (*shape[:dim], size, *shape[dim + 1 :])


@dataclass
class Links:
    """What rules become once the shapes of our tensors are known."""

    links: list[Link] = field(default_factory=list)
    """In the order of our tensors."""
    shapes: dict[str, Shape] = field(default_factory=dict)
    """Their tensors."""

    def join(self, ours: str, theirs: str, mine: Spans, their: Spans, shape: Shape, transposed: bool = False) -> None:
        """Note a link; `their` and `shape`, of all of their tensor, are in our orientation where `transposed`."""
        if transposed:
            their, shape = swapped(their), swapped(shape)
        self.add(Link(ours, theirs, mine, their, transposed), shape)

    def add(self, link: Link, shape: Shape) -> None:
        """Note a link to their tensor of that shape."""
        self.links.append(link)
        self.shapes[link.theirs] = shape


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, so that layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
