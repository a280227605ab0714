"""A loss or gradient that is not finite is found before the optimizer step, on all ranks alike: the global loss and the
global norm are the same number everywhere, so every rank takes the same turn without asking. Only then is it worth a
collective to say where it came from."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_finite(loss: float, norm: float) -> bool:
    """Whether a step with this global loss and gradient norm may change the weights."""
    return math.isfinite(loss) and math.isfinite(norm)


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
    found: list[list[str]] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != dist.Backend.FAKE:
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
    ranks = [f"rank {rank}: {', '.join(what)}" for rank, what in enumerate(found) if what]
    return f"step {step}: loss {loss}, gradient norm {norm} ({'; '.join(ranks) or 'no rank alone'})"
