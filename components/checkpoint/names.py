"""Tables between our names of tensors and those of another format: each family's is a list of rules like these.

A rule is declarative and says nothing about a direction: it becomes links, each of which says that these elements of
one of our tensors are those elements of one of theirs. Import and export, whole or cut into any boxes, follow the same
links, so that one cannot forget what the other does. Pairs of functions (to and from) were rejected: they have to be
kept inverse by hand, and need whole tensors. A link is a box on either side, rows of which may lie some steps apart;
of the orders that elements can have, only the last two dimensions can be the other way round. Torch-free.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from components.checkpoint.links import Link, Links, Shape, Shapes, Span, natural, part, resized, whole
from components.runtime.errors import CheckpointError


class Rule(Protocol):
    """A line of a table. Names may hold `{layer}`, which stands for a number, the same one on both sides."""

    @property
    def our_names(self) -> tuple[str, ...]:
        """Our tensors that it speaks of."""
        ...

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """Add its links for these tensors of ours, in the order of `our_names`."""
        ...


@dataclass(frozen=True)
class _OfOne:
    """A rule that speaks of one tensor of ours."""

    ours: str

    @property
    def our_names(self) -> tuple[str, ...]:
        """See Rule."""
        return (self.ours,)


@dataclass(frozen=True)
class Rename(_OfOne):
    """The same tensor under another name."""

    theirs: str
    transposed: bool = False
    """Theirs has the last two dimensions the other way round."""
    buffer: bool = False
    """It is no parameter: counts leave it out, and it is exported in fp32 whatever the type of the others."""

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule."""
        ((name, shape),) = ours
        _require_matrix(name, shape, self.transposed)
        into.join(name, _named(self.theirs, layer), whole(shape), whole(shape), shape, self.transposed)


@dataclass(frozen=True)
class Permute(_OfOne):
    """The same rows in another order: ours are `theirs.view(*view, …).permute(order, …)`, made one dimension again."""

    theirs: str
    view: Shape
    """Their rows as several dimensions: (heads, head_dim / 2, 2) for Meta's rotary pairs."""
    order: Shape
    """Which of these comes where in ours: (0, 2, 1)."""

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule. One link for each run of our rows whose distance in theirs is even."""
        ((name, shape),) = ours
        if math.prod(self.view) != shape[0] or sorted(self.order) != [*range(len(self.view))]:
            raise CheckpointError(f"{name}: {shape[0]} rows cannot be seen as {self.view} in the order {self.order}")
        strides = [math.prod(self.view[dim + 1 :]) for dim in self.order]
        *outer, count = (self.view[dim] for dim in self.order)
        for number, at in enumerate(itertools.product(*map(range, outer))):
            start = sum(index * stride for index, stride in zip(at, strides, strict=False))
            mine = (Span(number * count, count), *whole(shape[1:]))
            their = (Span(start, count, strides[-1]), *whole(shape[1:]))
            into.add(Link(name, _named(self.theirs, layer), mine, their), shape)


@dataclass(frozen=True)
class Merge:
    """Several of ours, one after the other along `dim`, are one of theirs."""

    ours: tuple[str, ...]
    theirs: str
    dim: int = 0
    """Of ours, where it is not that of theirs."""
    interleaved: bool = False
    """They take turns along `dim`, instead of one after the other: index i of the j-th of n is i·n + j in theirs."""
    transposed: bool = False
    """Theirs has the last two dimensions the other way round."""

    @property
    def our_names(self) -> tuple[str, ...]:
        """See Rule."""
        return self.ours

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule. Raises CheckpointError for lengths that cannot take turns."""
        lengths = [shape[self.dim] for _, shape in ours]
        merged = resized(ours[0][1], self.dim, sum(lengths))
        if self.interleaved and len({*lengths}) > 1:
            raise CheckpointError(f"{ours[0][0]}: {lengths} along dimension {self.dim} cannot take turns")
        for number, (name, shape) in enumerate(ours):
            _require_matrix(name, shape, self.transposed)
            start = number if self.interleaved else sum(lengths[:number])
            span = Span(start, shape[self.dim], len(ours) if self.interleaved else 1)
            their = (*whole(shape[: self.dim]), span, *whole(shape[self.dim + 1 :]))
            into.join(name, _named(self.theirs, layer), whole(shape), their, merged, self.transposed)


def _require_matrix(name: str, shape: Shape, transposed: bool) -> None:
    if transposed and len(shape) < 2:
        raise CheckpointError(f"{name}: shape {[*shape]} has no two dimensions to transpose")


@dataclass(frozen=True)
class Split(_OfOne):
    """One of ours is several of theirs, one after the other along `dim`."""

    theirs: tuple[str, ...]
    sizes: Shape
    """Their lengths along `dim`."""
    dim: int = 0

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule."""
        ((name, shape),) = ours
        if sum(self.sizes) != shape[self.dim]:
            raise CheckpointError(
                f"{name}: {shape[self.dim]} along dimension {self.dim} do not split into {self.sizes}"
            )
        start = 0
        for theirs, size in zip(self.theirs, self.sizes, strict=True):
            theirs_shape = resized(shape, self.dim, size)
            mine = part(shape, self.dim, start, size)
            into.add(Link(name, _named(theirs, layer), mine, whole(theirs_shape)), theirs_shape)
            start += size


@dataclass(frozen=True)
class StackExperts(_OfOne):
    """One of ours holds, along its first dimension, a tensor of theirs for each `{expert}`."""

    theirs: str

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule."""
        ((name, shape),) = ours
        for expert in range(shape[0]):
            theirs = _named(self.theirs, layer).replace("{expert}", str(expert))
            into.add(Link(name, theirs, (Span(expert, 1), *whole(shape[1:])), whole(shape[1:])), shape[1:])


@dataclass(frozen=True)
class OursAlone(_OfOne):
    """A tensor that they have no place for: not exported, and left as it is on import. A name that ends in a dot stands
    for all that begin so."""

    why: str
    """What it is, for the log."""
    buffer: bool = True
    """It is no parameter: counts leave it out."""

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule: nothing."""


@dataclass(frozen=True)
class TheirsAlone:
    """A tensor that their files may hold and we have no place for."""

    theirs: str
    """Its name; `{layer}` stands for a number. A name that ends in a dot stands for all that begin so."""
    same_as: str | None = None
    """Their tensor that it must equal, element by element; None: it is not looked at."""
    written: bool = False
    """It is exported too, as a copy."""


@dataclass(frozen=True)
class Table:
    """A family's rules, applied to the tensors of one model."""

    links: tuple[Link, ...]
    """All of them, in the natural order of our names."""
    ours: Shapes
    """Our tensors that are exported and imported."""
    theirs: Shapes
    """Their tensors, with the shapes that they must have."""
    alone: Mapping[str, str]
    """Our tensors that they have no place for, each with what it is."""
    extras: tuple[TheirsAlone, ...] = ()
    """What their files may hold besides."""
    buffers: frozenset[str] = frozenset()
    """Those of ours that are no parameters."""

    def extra(self, name: str) -> TheirsAlone | None:
        """What allows a tensor of theirs that is not in `theirs`; None: nothing does."""
        return next((extra for extra in self.extras if _pattern(extra.theirs).fullmatch(name)), None)

    def leaves_out(self, name: str) -> bool:
        """Whether it is one of those that are left out by how their names begin: of a part that the model has not."""
        return name not in self.theirs and (extra := self.extra(name)) is not None and extra.theirs.endswith(".")


def _named(pattern: str, layer: str) -> str:
    return pattern.replace("{layer}", layer)


def _pattern(name: str) -> re.Pattern[str]:
    rest = ".+" if name.endswith(".") else ""
    return re.compile(re.escape(name).replace(re.escape("{layer}"), r"(?P<layer>0|[1-9][0-9]*)") + rest)


def apply_rules(rules: Iterable[Rule], extras: Iterable[TheirsAlone], shapes: Shapes) -> Table:
    """The table of a model whose tensors have these names and shapes.

    Raises CheckpointError for a tensor of ours that no rule or more than one speaks of, and for a tensor of theirs that
    is not filled exactly: a family's rules are then wrong, or the model is not of this family.
    """
    found, alone, rules_of, buffers = list[Links](), dict[str, str](), dict[str, int](), set[str]()
    for rule, layer, names in _bindings(tuple(rules), shapes):
        if missing := [name for name in names if name not in shapes]:
            raise CheckpointError(f"{names[0]} has no table entry without {', '.join(missing)}, which is not there")
        for name in names:
            rules_of[name] = rules_of.get(name, 0) + 1
        if isinstance(rule, OursAlone):
            alone[names[0]] = rule.why
        if isinstance(rule, Rename | OursAlone) and rule.buffer:
            buffers.add(names[0])
        found.append(Links())
        rule.link([(name, shapes[name]) for name in names], layer, found[-1])
    problems = [f"{name} is in {rules_of.get(name, 0)} rules" for name in shapes if rules_of.get(name, 0) != 1]
    links = sorted((link for each in found for link in each.links), key=lambda link: natural(link.ours))  # stable
    theirs = {name: shape for each in found for name, shape in each.shapes.items()}
    ours = {name: shape for name, shape in shapes.items() if name not in alone}
    sides = (_unfilled(links, ours, lambda link: link.ours), _unfilled(links, theirs, lambda link: link.theirs))
    if problems := problems or [*sides[0], *sides[1]]:
        raise CheckpointError(f"the family's table of names does not fit: {'; '.join(sorted(problems))}")
    return Table(tuple(links), ours, theirs, alone, tuple(extras), frozenset(buffers))


def _bindings(rules: tuple[Rule, ...], shapes: Shapes) -> Iterator[tuple[Rule, str, list[str]]]:
    """Each rule with each layer that one of the tensors gives it, and its names of ours there."""
    for rule in rules:
        pattern = _pattern(rule.our_names[0])
        for name in sorted(shapes, key=natural):
            if match := pattern.fullmatch(name):
                layer = match.groupdict().get("layer", "")
                yield rule, layer, [name, *(_named(each, layer) for each in rule.our_names[1:])]


def _unfilled(links: list[Link], shapes: Shapes, of: Callable[[Link], str]) -> list[str]:
    counts = dict.fromkeys(shapes, 0)
    for link in links:
        counts[of(link)] += link.count
    return [
        f"{name}: {counts[name]} of {math.prod(shape)} elements are in the table"
        for name, shape in shapes.items()
        if counts[name] != math.prod(shape)
    ]
