"""Communication inside of the model: what one rank's activations owe to the ranks beside it, and the gradients of that.

Every function takes plain local tensors and returns plain local tensors that are complete when it returns. DTensor's
own operators were rejected for activations: they dispatch each operation in Python, return asynchronous wrappers that
leak into compiled code, and hide which gradients are partial sums. Here each function says so in its name or its first
line. The calls are torch's functional operators, which trace, fake and count like any other operator.

Two kinds of tensors meet in these functions. *Parts*: each rank holds another piece, and the gradient of a piece is its
own. *Shared*: each rank holds the whole, but computes only its share of what follows, so that the ranks' gradients are
summands. Who mixes the two up gets a right loss and a wrong gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh, as seen by code that communicates along it."""

    group: dist.ProcessGroup
    """The ranks along it."""
    size: int
    """Number of ranks."""
    rank: int
    """This rank's place among them. Under `comm.mode = "local_tensor"` a symbolic integer, different on each rank."""

    @property
    def name(self) -> str:
        """The group's name, as the functional operators want it."""
        return self.group.group_name


def gather(x: Tensor, dim: int, axis: Axis | None) -> Tensor:
    """Parts → shared: all ranks' equal pieces, joined along `dim`. Gradients are summed; each rank gets its piece's.

    `axis` None: `x` itself, as in all functions here.
    """
    return x if axis is None else _Gather.apply(x, dim % x.ndim, axis)


def reduce_scatter(x: Tensor, dim: int, axis: Axis | None) -> Tensor:
    """Summands → parts: the sum over ranks, of which each gets its equal piece along `dim`. Gradients are gathered."""
    return x if axis is None else _ReduceScatter.apply(x, dim % x.ndim, axis)


def sum_gradient(x: Tensor, axis: Axis | None) -> Tensor:
    """`x` itself, the same on all ranks, now shared: its gradient is the ranks' sum, taken in fp32.

    What every replicated parameter goes through before ranks use it on different tokens or heads.
    """
    return x if axis is None else _SumGradient.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis | None) -> Tensor:
    """Summands → the sum, the same on all ranks. What follows is the same on all ranks, so that gradients pass as they
    are."""
    return x if axis is None else _AllReduce.apply(x, axis)


def largest(x: Tensor, axis: Axis | None) -> Tensor:
    """The largest over ranks, element by element, the same on all ranks. Without a gradient."""
    if axis is None:
        return x.detach()
    return _ops.wait_tensor(_ops.all_reduce(x.detach().contiguous(), "max", axis.name))


def join(x: Tensor, dim: int, axis: Axis | None, sizes: Sequence[int]) -> Tensor:
    """Parts → the whole, along `dim`; `sizes` are the ranks' lengths, which may differ. Padding happens inside.

    What follows is the same on all ranks: each rank's gradient is the whole's, of which it takes its piece.
    """
    return x if axis is None else _Join.apply(x, dim % x.ndim, axis, tuple(sizes))


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis | None) -> Tensor:
    """Rows change ranks: `sent[r]` rows of `x` go to rank r, in order; `received[r]` come from it. Gradients go back.

    Args:
        x: # (sum(sent), ...)
        received: Rows that come from each rank; a count may be 0.
        sent: Rows that go to each rank.
        axis: The ranks.

    Returns:
        # (sum(received), ...)
    """
    return x if axis is None else _AllToAll.apply(x, tuple(received), tuple(sent), axis)


def piece(x: Tensor, dim: int, axis: Axis | None) -> Tensor:
    """This rank's equal piece along `dim` of what all ranks hold alike: for token ids, positions, masks. Not for what
    needs a gradient: that of the whole would be missing the others' pieces."""
    if axis is None:
        return x
    length = x.shape[dim] // axis.size
    # Not a slice: a symbolic rank can be added to a tensor, but not slice one that all ranks have alike.
    return x.index_select(dim, torch.arange(length, device=x.device) + axis.rank * length)


def sizes_of(total: int, parts: int) -> list[int]:
    """How `total` elements fall to ranks: ceil(total / parts) each, then a smaller piece, then none. DTensor's rule."""
    step = -(-total // parts)
    return [max(0, min(step, total - rank * step)) for rank in range(parts)]


_ops = torch.ops._c10d_functional  # funcol's own target; funcol's functions return wrappers that wait later


def _all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    out = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.name))
    return torch.cat(torch.chunk(out, axis.size, dim=0), dim=dim) if dim else out


def _reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    x = torch.cat(torch.chunk(x, axis.size, dim=dim)) if dim else x.contiguous()
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x, "sum", axis.size, axis.name))


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", axis.name))


def _all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(received), list(sent), axis.name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return _reduce_scatter(grad, ctx.dim, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _reduce_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return _all_gather(grad, ctx.dim, ctx.axis), None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return _all_reduce(grad.float(), ctx.axis).to(grad.dtype), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return grad, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, sizes: tuple[int, ...]) -> Tensor:
        ctx.dim, ctx.axis, ctx.sizes, ctx.own = dim, axis, sizes, x.shape[dim]
        shape = list(x.shape)
        shape[dim] = max(sizes) - x.shape[dim]
        padded = torch.cat((x, x.new_zeros(shape)), dim=dim) if min(sizes) < max(sizes) else x
        pieces = torch.chunk(_all_gather(padded, dim, axis), axis.size, dim=dim)
        return torch.cat([p.narrow(dim, 0, size) for p, size in zip(pieces, sizes, strict=True)], dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        start = ctx.axis.rank * max(ctx.sizes)  # only the last piece that is not empty may be shorter
        start = cast(int, torch.sym_min(start, grad.shape[ctx.dim]))  # typed as a float
        return grad.narrow(ctx.dim, start, ctx.own), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: tuple[int, ...], sent: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.received, ctx.sent, ctx.axis = received, sent, axis
        return _all_to_all(x, received, sent, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        return _all_to_all(grad, ctx.sent, ctx.received, ctx.axis), None, None, None
