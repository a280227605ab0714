"""Where a bad step began. The global loss and norm say that it is bad; only then is it worth a collective to ask each
rank for its part."""

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")
LISTED = 4
"""Ranks that a message tells of."""


def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first parameter whose local gradient is not finite."""
    for name, parameter in named:
        grad = parameter.grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if local is not None and not torch.isfinite(local).all():
            return name
    return None


def describe(step: int, loss: float, norm: float, local_loss: float, parameter: str | None) -> str:
    """The message for a step that was not finite: what, and on which ranks it began. Collective."""
    mine = [] if math.isfinite(local_loss) else ["loss"]
    mine += [f"gradient of {parameter}"] if parameter else []
    ranks = [f"rank {rank}: {', '.join(what)}" for rank, what in enumerate(_of_all(mine)) if what]
    return f"step {step}: loss {loss}, gradient norm {norm} ({'; '.join(ranks) or 'no rank alone'})"


def largest_losses(local_loss: float) -> str:
    """The ranks whose rows had the largest summed losses. Collective."""
    losses = sorted(((loss, -rank) for rank, loss in enumerate(_of_all(local_loss))), reverse=True)
    listed = ", ".join(f"{loss:.1f} on rank {-rank}" for loss, rank in losses[:LISTED])
    return f"largest sums of losses: {listed}"


def _of_all(mine: T) -> list[T]:
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == dist.Backend.FAKE:
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
