"""Do ranks that must hold the same values hold them? For when a layout gives other numbers than it should.

Every rank tells, for each piece of a parameter that it holds, two numbers of its gradient and of its weight: the norm,
and the projection on one fixed direction, which also changes where only a sign or an order does. Ranks that hold the
same piece must agree on them; where they do not, a reduction is missing, or doubled, or weights have drifted apart.
Costs a pass over all gradients and weights and one gather of a few numbers for each; so it is done on demand
(`debug.compare_ranks`). Comparing whole tensors was rejected: it would cost a copy of the model on the wire.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from components.runtime.logging import logger

if TYPE_CHECKING:
    from trainer.trainer import Trainer

AGREE = 1e-6
"""Relative difference up to which values agree: reductions give all ranks the same bits, save for a few ulps."""
LISTED = 10
"""Disagreements that the log lists, the worst."""

Piece = tuple[str, tuple[int, ...]]
"""A parameter's name, and the place of this rank's piece along the mesh dimensions that shard it."""
Numbers = tuple[float, float]
"""Norm, and projection on a fixed direction."""


@dataclass(frozen=True)
class Disagreement:
    """A piece on which ranks that hold it do not agree."""

    parameter: str
    ranks: list[int]
    norms: list[float]
    """Of each of these ranks."""
    difference: float
    """The largest difference of norms or projections, relative to the largest norm."""


def compare_ranks(trainer: Trainer) -> None:
    """Compare gradients and weights of all ranks if the step is due; log and note what differs. Collective."""
    every, step = trainer.job.debug.compare_ranks, trainer.progress.step
    if not every or step % every:
        return
    parts = [list(model.named_parameters()) for model in trainer.models]  # two stages may hold the same parameter
    gradients = _gather([numbers_of((name, p.grad) for name, p in named if p.grad is not None) for named in parts])
    weights = _gather([numbers_of(named) for named in parts])
    if trainer.world.rank:
        return
    merged = [{piece: numbers for part in held for piece, numbers in part.items()} for held in gradients]
    totals = [math.sqrt(sum(norm * norm for norm, _ in held.values())) for held in merged]
    found = {"gradients": compare(gradients), "weights": compare(weights)}
    for what, (shared, worst) in found.items():
        _log(step, what, shared, worst)
    logger.info("step %d: norm of all local gradients: %s", step, _row(range(len(totals)), totals))
    told = {
        what: {"shared": shared, "disagree": [asdict(one) for one in worst]} for what, (shared, worst) in found.items()
    }
    trainer.sinks.note({"event": "compared_ranks", "step": step, "local_norms": totals, **told})


@torch.no_grad()
def numbers_of(named: Iterable[tuple[str, Tensor]]) -> dict[Piece, Numbers]:
    """The numbers of this rank's piece of each tensor, in float64."""
    return {(name, _place(value)): _numbers(value) for name, value in named}


def compare(held: Sequence[Sequence[Mapping[Piece, Numbers]]]) -> tuple[int, list[Disagreement]]:
    """How many pieces are held more than once, and those whose holders disagree, the worst first. `held`: by rank, and
    by pipeline stage of the rank."""
    holders: dict[Piece, list[tuple[int, Numbers]]] = defaultdict(list)
    for rank, parts in enumerate(held):
        for piece, numbers in (item for part in parts for item in part.items()):
            holders[piece].append((rank, numbers))
    shared = {piece: copies for piece, copies in holders.items() if len(copies) > 1}
    found = [_judge(piece[0], [c[0] for c in copies], [c[1] for c in copies]) for piece, copies in shared.items()]
    worst = [one for one in found if not one.difference <= AGREE]  # what is no number agrees with nothing
    return len(shared), sorted(worst, key=lambda one: (-one.difference, one.parameter))


def _judge(name: str, ranks: list[int], numbers: Sequence[Numbers]) -> Disagreement:
    norms, projections = zip(*numbers, strict=True)
    if not all(math.isfinite(value) for pair in numbers for value in pair):
        return Disagreement(name, ranks, list(norms), math.inf)
    difference = max(max(norms) - min(norms), max(projections) - min(projections))
    return Disagreement(name, ranks, list(norms), difference / max(*norms, 1e-300))


def _place(value: Tensor) -> tuple[int, ...]:
    """Where along its mesh this rank's piece lies; ranks that differ in replicated dimensions alone hold the same."""
    if not isinstance(value, DTensor):
        return ()
    at = value.device_mesh.get_coordinate() or ()
    return tuple(place for place, how in zip(at, value.placements, strict=True) if not how.is_replicate())


def _numbers(value: Tensor) -> Numbers:
    local = (value.to_local() if isinstance(value, DTensor) else value).detach().flatten().double()
    direction = torch.arange(local.numel(), device=local.device, dtype=torch.float64).cos()
    unit = direction / direction.norm().clamp(min=1.0)
    return float(local.norm()), float(local @ unit)


def _gather(mine: list[dict[Piece, Numbers]]) -> list[list[dict[Piece, Numbers]]]:
    """Those of all ranks, on rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None, dst=0)
    return everyone


def _log(step: int, what: str, shared: int, worst: Sequence[Disagreement]) -> None:
    if not worst:
        logger.info("step %d: %s: all %d pieces that several ranks hold agree", step, what, shared)
        return
    logger.warning("step %d: %s: %d of %d pieces that several ranks hold disagree", step, what, len(worst), shared)
    for one in worst[:LISTED]:
        logger.warning("  %s: difference %.1e: %s", one.parameter, one.difference, _row(one.ranks, one.norms))


def _row(ranks: Iterable[int], norms: Sequence[float]) -> str:
    return ", ".join(f"rank {rank} {norm:.6g}" for rank, norm in zip(ranks, norms, strict=True))
