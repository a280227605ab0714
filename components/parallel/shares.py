"""What single layers compute under tensor parallelism: each rank its span of the features or of the vocabulary.

The first arguments of each function are bound by `components.parallel.tensor`; the rest is the layer's own call.
Nothing in here branches on the rank, nor compares tensors with it: under `comm.mode = "local_tensor"` it is symbolic.
What differs between ranks are sizes, which come from the local tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.mesh.collectives import Axis, gather, join, reduce_scatter, sizes_of, sum_gradient
from components.mesh.projection import Projection, VocabularyShard
from components.parallel.local import local


def bound(fn: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`functools.partial` as a closure: the compiler, which tells partials apart by their identity, then lets equal
    blocks share one artifact."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fn(*first, *args, **kwargs)

    return forward


@dataclass(frozen=True)
class Span:
    """What a rank computes of a dimension that ranks share."""

    start: int
    """Its first element."""
    size: int
    """Its number of elements, where the parameter is `shared`; else the local tensor's length says it."""
    shared: bool
    """Each rank holds the whole parameter and takes its span; else it holds nothing but the span."""

    @classmethod
    def of(cls, total: int, axis: Axis) -> "Span":
        """An even cut, the last piece shorter. Where a rank would have nothing, all hold the whole, which is small:
        FSDP2 cannot reduce a gradient without elements."""
        sizes = sizes_of(total, axis.size)
        start = axis.rank * sizes[0]
        if sizes[-1]:
            return cls(start, sizes[0], shared=False)
        start = _least(start, total)
        return cls(start, _least(sizes[0], total - start), shared=True)

    def take(self, module: nn.Module, leaf: str, dim: int, axis: Axis) -> Any:
        """This rank's part of a module's parameter along `dim`; None if it has no such parameter."""
        found = local(module, leaf)
        if found is None or not self.shared:
            return found
        return sum_gradient(found, axis).narrow(dim, self.start, self.size)


def _least(a: int, b: int) -> int:
    return cast(int, torch.sym_min(a, b))  # typed as a float, but of integers an integer, symbolic ones included


class Local:
    """A module as its `forward` sees it under `Replicated`, or without an axis under `Dealt`: its own parameters are
    local tensors, all else is its own.

    Swapping the parameters of the module itself was rejected: compiled code would have to prove that they come back.
    """

    def __init__(self, module: nn.Module, axis: Axis | None) -> None:
        self.module, self.axis = module, axis

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return sum_gradient(local(self.module, name), self.axis) if isinstance(value, DTensor) else value


def gathered(forward: Callable[..., Any], axis: Axis, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Gathered`: `x` comes as a piece of each sequence. # (rows, seq / tp, dim) → (rows, seq / tp, dim)"""
    return forward(gather(x, 1, axis), *args, **kwargs)


def columns(module: nn.Module, axis: Axis, span: Span, x: Tensor) -> Tensor:
    """`Columns`: whole sequences, this rank's features. # (rows, seq, in) → (rows, seq, out / tp)"""
    return F.linear(x, span.take(module, "weight", 0, axis), span.take(module, "bias", 0, axis))


def rows(module: nn.Module, axis: Axis, span: Span, x: Tensor) -> Tensor:
    """`Rows`: this rank's features, and its piece of the sum. # (rows, seq, in / tp) → (rows, seq / tp, out)"""
    out = reduce_scatter(F.linear(x, span.take(module, "weight", 1, axis)), 1, axis)
    bias = local(module, "bias")
    return out if bias is None else out + sum_gradient(bias, axis)


def embedding(module: nn.Module, axis: Axis, span: Span, tokens: Tensor) -> Tensor:
    """Each rank looks up the tokens of its vocabulary; the others are 0 there. # (rows, seq) → (rows, seq / tp, dim)"""
    weight = span.take(module, "weight", 0, axis)
    index = tokens - span.start
    inside = (index >= 0) & (index - weight.shape[0] < 0)  # symbolic sizes subtract, but do not compare with tensors
    if span.shared:  # some ranks have no entry to point other ranks' tokens at
        weight = F.pad(weight, (0, 0, 0, 1))
    out = F.embedding(torch.where(inside, index, 0), weight)
    return reduce_scatter(out.masked_fill(~inside[..., None], 0.0), 1, axis)


def head(
    module: nn.Module,
    axis: Axis,
    span: Span,
    vocab_size: int,
    whole: bool,
    input: Tensor,
    apply: Callable[[Tensor, Projection], Any] | None = None,
) -> Any:
    """The contract of `components.layers.head.Head`, for hidden states (rows, seq / tp, dim)."""
    weight, bias = span.take(module, "weight", 0, axis), span.take(module, "bias", 0, axis)
    shard = VocabularyShard(axis, vocab_size, weight.shape[0])

    def mine(hidden: Tensor) -> Tensor:
        return F.linear(hidden, weight, bias)

    def all_of_them(hidden: Tensor) -> Tensor:
        return join(mine(hidden), -1, axis, shard.sizes)

    project = Projection(all_of_them) if whole else Projection(mine, shard)
    hidden = gather(input, 1, axis)
    return project(hidden) if apply is None else apply(hidden, project)
