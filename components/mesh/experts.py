"""What mixture-of-experts layers and expert parallelism both need: whose tokens they see, and the order that experts
compute in.

It stands here since the layer routes, the applier sends, and neither may import the other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.mesh.collectives import Axis


@dataclass(frozen=True)
class TokenRanks:
    """Which ranks hold the tokens that one rank's layer does not see. Empty on one rank."""

    sequence: Axis | None = None
    """Hidden states are cut along the sequence over these ranks, but the inputs of each token are not (`tp`)."""
    row: tuple[Axis, ...] = ()
    """Ranks that share each row (`cp`, `tp`)."""
    batch: tuple[Axis, ...] = ()
    """Ranks that share a global batch (`batch` × `cp`, `tp`)."""


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order that brings choices to their experts, and how many there are of each.

    Args:
        chosen: Expert of each choice, int64. # (choices,)
        experts: Number of experts.

    Returns:
        Indices of the choices, those of expert 0 first, each expert's in their own order # (choices,); and int64
        counts. # (experts,)
    """
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return torch.sort(chosen, stable=True).indices, counts.scatter_add(0, chosen, torch.ones_like(chosen))


def routed(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Each token once for each of its k choices, ordered by expert. # (tokens, dim) → (tokens · k, dim)

    The gradients of a token's copies are added up at once, in the order of its choices: indexing's own backward adds
    one after the other in the type of compute, on CUDA in whatever order they come.
    """
    return _Routed.apply(x, order, k)


def back(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `x[order]`: rows where they were before. # (n, ...)"""
    return x.index_select(0, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)))


def combine(out: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's experts, weighted, in the order of its choices whatever the experts' order was.

    Args:
        out: Outputs, ordered by expert. # (tokens · k, dim)
        order: `by_expert`'s.
        weights: Weight of each choice. # (tokens, k)

    Returns:
        # (tokens, 1, dim); no view of it, since FSDP's hooks hang on the very tensor that experts return
    """
    tokens, k = weights.shape
    chosen = back(out, order).view(tokens, k, -1)
    return torch.bmm(weights[:, None].to(out.dtype), chosen)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.k = k
        ctx.save_for_backward(order)
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        (order,) = ctx.saved_tensors
        return back(grad, order).unflatten(0, (-1, ctx.k)).sum(1), None, None
