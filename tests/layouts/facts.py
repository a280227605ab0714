"""What a run computed, whole, and how two runs are compared.

Ranks send their pieces with the places that these have in the whole; they are put together here, without torch's own
`full_tensor`, so that a wrong layout cannot hide behind the code that made it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The numbers of one optimizer step that a user sees."""

    loss: float
    max_loss: float
    grad_norm: float
    tokens: int
    """Valid label tokens so far."""


@dataclass(frozen=True)
class Facts:
    """What must not depend on the layout."""

    steps: list[Step]
    validation: float
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    updates: dict[str, Tensor]
    """Final value − initial value of each parameter, and of each buffer that training changes."""
    torn: list[str] = field(default_factory=list)
    """Where the ranks' pieces did not make a whole."""


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    places: list[Tensor]
    """For each dimension the positions that the part holds."""
    values: Tensor


Pieces = dict[str, Piece]


@dataclass(frozen=True)
class Told:
    """What one rank recorded."""

    steps: list[Step]
    validation: float
    gradients: Pieces
    updates: Pieces


@dataclass(frozen=True)
class Bounds:
    """How far a run may be from its reference, relative to it."""

    scalar: float = 1e-5
    """Loss, gradient norm, largest row loss, validation loss."""
    gradient: float = 1e-5
    """Norm of a gradient's difference, relative to the larger of its norm and a thousandth of the global norm."""
    update: float = 1e-3
    """Norm of the difference of three steps' update."""
    replica: float = 1e-5
    """Norm of the difference of two ranks' copies of the same gradient."""


EXACT = Bounds()
LOW = Bounds(scalar=1e-2, gradient=5e-2, update=1e-1)
"""For bf16: its rounding error is 2⁻⁹ an operation, and another order of sums rounds otherwise. Seen at most: 3e-3,
5e-2 and 9e-2, where four ranks of tensor parallelism add up bf16 summands; without it 1e-2 for gradients."""


def assemble(ranks: list[Told], aliases: Mapping[str, str], bounds: Bounds = EXACT) -> Facts:
    """The whole of what the ranks hold.

    `aliases`: the canonical name of every parameter's name, tied ones having several.
    """
    first, torn = ranks[0], []
    for number, rank in enumerate(ranks):
        if rank.steps != first.steps or rank.validation != first.validation:
            torn.append(f"rank {number} tells {rank.steps, rank.validation}, rank 0 {first.steps, first.validation}")
    gradients = _whole([rank.gradients for rank in ranks], aliases, bounds.replica, torn)
    updates = _whole([rank.updates for rank in ranks], aliases, bounds.update, torn)
    return Facts(first.steps, first.validation, gradients, updates, torn)


def _whole(ranks: list[Pieces], aliases: Mapping[str, str], bound: float, torn: list[str]) -> dict[str, Tensor]:
    """The pieces put together; what is wrong with them is added to `torn`."""
    whole: dict[str, Tensor] = {}
    for number, pieces in enumerate(ranks):
        for own, piece in pieces.items():
            name = aliases.get(own, own)
            there = whole.setdefault(name, torch.full(piece.shape, math.nan))
            torn += [f"{own} of rank {number} {what}" for what in _put(there, piece, bound)]
    for name, value in whole.items():
        if holes := int(value.isnan().sum()):
            torn.append(f"no rank holds {holes} elements of {name}")
    return whole


def _put(there: Tensor, piece: Piece, bound: float) -> Iterator[str]:
    """Write a piece, or compare it where another rank's copy is."""
    if there.shape != piece.shape:
        yield f"has shape {piece.shape}, elsewhere {tuple(there.shape)}"
        return
    at = torch.meshgrid(*piece.places, indexing="ij") if piece.places else ()
    held = there[at]
    known = ~held.isnan()
    difference, size = (held - piece.values)[known].norm(), held[known].norm()
    if not difference <= bound * max(float(size), 1e-6):
        yield f"differs from its copy by {difference:.3g} of {size:.3g}"
    there[at] = torch.where(known, held, piece.values)


def differences(found: Facts, want: Facts, bounds: Bounds = EXACT) -> list[str]:
    """Where a run is out of bounds; empty if it computed the same."""
    return [*found.torn, *_scalars(found, want, bounds.scalar), *_tensors(found, want, bounds)]


def _scalars(found: Facts, want: Facts, bound: float) -> list[str]:
    lines = [] if len(found.steps) == len(want.steps) else [f"{len(found.steps)} steps, not {len(want.steps)}"]
    for number, (mine, theirs) in enumerate(zip(found.steps, want.steps, strict=False), start=1):
        if mine.tokens != theirs.tokens:
            lines.append(f"step {number}: {mine.tokens} tokens, not {theirs.tokens}")
        for name in ("loss", "max_loss", "grad_norm"):
            lines += _far(f"step {number}: {name}", getattr(mine, name), getattr(theirs, name), bound)
    return lines + _far("validation loss", found.validation, want.validation, bound)


def _far(what: str, found: float, want: float, bound: float) -> list[str]:
    far = not abs(found - want) <= bound * abs(want)  # so that NaN is far
    return [f"{what} {found:.7g}, not {want:.7g}: off by {abs(found / want - 1):.2g}"] if far else []


def _tensors(found: Facts, want: Facts, bounds: Bounds) -> list[str]:
    lines = []
    norm = torch.stack([gradient.norm() for gradient in want.gradients.values()]).norm()
    for kind, bound, floor in (("gradients", bounds.gradient, 1e-3 * norm), ("updates", bounds.update, 0.0)):
        mine, theirs = getattr(found, kind), getattr(want, kind)
        if mine.keys() != theirs.keys():
            lines.append(f"{kind} of other names: {sorted(mine.keys() ^ theirs.keys())}")
        for name in mine.keys() & theirs.keys():
            difference, size = (mine[name] - theirs[name]).norm(), max(theirs[name].norm(), torch.as_tensor(floor))
            if not difference <= bound * size:
                lines.append(f"{kind} of {name}: off by {float(difference / size):.2g}")
    return lines
