"""The experts of a mixture: gated feed-forward layers whose parameters are stacked, on tokens ordered by expert.

One grouped matmul serves groups of any length, empty ones too. Where torch has none for a shape, experts run one by
one: the same numbers, a launch for each.

Biases join a grouped product as a second one, of a matrix that says which expert each token is with. That costs
experts / dim of the product, and gives biases gradients that are summed like those of matrices, in one go and in fp32;
indexing's own backward adds token after token in the type of compute, on CUDA in whatever order they come.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home; torch's own documentation imports it here
from torch.distributed.tensor import DTensor

from components.layers.feed_forward import gated
from components.layers.initialize import Constant, Init
from components.layers.shapes import Activation, ExpertsShape
from components.mesh.collectives import Axis
from components.mesh.experts import by_expert, combine, routed


class _Weights(NamedTuple):
    """The parameters of all experts of a rank, stacked, or those of one."""

    w1: Tensor
    w2: Tensor
    w3: Tensor
    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None


class Experts(nn.Module):
    """Experts, `w2(act(w1 x + b1) · (w3 x + b3)) + b2` each, their parameters stacked; biases only if the shape has
    them."""

    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None
    sharing: Axis | None = None
    """Ranks that each hold a part of every expert, cut along `hidden`, so that outputs are summands. Expert parallelism
    sets it; b2 is then cut along `dim`."""

    def __init__(self, dim: int, shape: ExpertsShape) -> None:
        super().__init__()
        experts, hidden = shape.count, shape.hidden
        self.activation: Activation = shape.activation
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, dim))
        for name, width in (("b1", hidden), ("b2", dim), ("b3", hidden)):
            self.register_parameter(name, nn.Parameter(torch.empty(experts, width)) if shape.bias else None)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts. Expert parallelism replaces this, but not `compute`.

        Args:
            x: Tokens. # (tokens, dim)
            chosen: Experts of each token, int64. # (tokens, k)
            weights: Their weights. # (tokens, k)

        Returns:
            # (tokens, 1, dim), see `combine`
        """
        order, counts = by_expert(chosen.flatten(), self.w1.shape[0])
        return combine(self.compute(routed(x, order, chosen.shape[1]), counts), order, weights)

    def compute(self, x: Tensor, counts: Tensor) -> Tensor:
        """This rank's experts, each applied to its tokens.

        Args:
            x: Tokens, ordered by expert. # (tokens, dim)
            counts: Tokens of each expert, int64. # (local experts,)

        Returns:
            # (tokens, dim); only a summand of it where ranks share experts (`sharing`)
        """
        own = self._local()
        dim, hidden = own.w2.shape[1:]
        # Without any token the kernel's backward finds no strides that it likes.
        if len(x) and not isinstance(x, FakeTensor) and can_group(x.device, x.dtype, dim, hidden):
            return _grouped(x, counts, own, self.activation)
        # Shapes without content have no counts: there all tokens go to one expert, which costs the same.
        sizes = [len(x)] if isinstance(x, FakeTensor) or not len(x) else counts.tolist()
        return _one_by_one(x, sizes, own, self.activation)

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: like the feed-forward matrices that they stand for."""
        table = {"w1": matrix, "w2": into_stream, "w3": matrix}
        return table if self.b1 is None else {**table, **dict.fromkeys(("b1", "b2", "b3"), Constant(0.0))}

    def _local(self) -> _Weights:
        own = (getattr(self, name) for name in _Weights._fields)
        weights = _Weights(*(w.to_local() if isinstance(w, DTensor) else w for w in own))
        if self.sharing is None or weights.b2 is None:
            return weights
        return weights._replace(b2=_in_place(weights.b2, self.sharing))


def _in_place(b2: Tensor, axis: Axis) -> Tensor:
    """A rank's piece of b2 among zeros, so that outputs of ranks add up to one b2. # (experts, dim / ranks) →
    (experts, dim)"""
    experts, width = b2.shape
    # Not a slice: the rank may be symbolic (`collectives.piece`).
    place = torch.arange(width, device=b2.device) + axis.rank * width
    return b2.new_zeros(experts, width * axis.size).index_copy(1, place, b2)


def _grouped(x: Tensor, counts: Tensor, own: _Weights, activation: Activation) -> Tensor:
    ends = counts.cumsum(0)
    offsets, owner = ends.to(torch.int32), None
    if own.b1 is not None:  # 1 where a token is with an expert, # (tokens, experts)
        place = torch.arange(len(x), device=x.device)[:, None]
        owner = ((place < ends) & (place >= ends - counts)).to(x.dtype)

    def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(x, weight.mT, offs=offsets)
        return out if bias is None or owner is None else torch.addmm(out, owner, bias)

    return times(gated(activation, times(x, own.w1, own.b1), times(x, own.w3, own.b3)), own.w2, own.b2)


def _one_by_one(x: Tensor, sizes: Sequence[int], own: _Weights, activation: Activation) -> Tensor:
    """What grouped matmuls give, expert by expert. The first one runs even if empty, so that weights have gradients."""
    stacks: list[Iterable[Any]] = [itertools.repeat(None) if w is None else w.unbind() for w in own]
    experts = (_Weights(*one) for one in zip(*stacks, strict=False))
    pieces = enumerate(zip(x.split(list(sizes)), experts, strict=False))
    return torch.cat([_one(part, one, activation) for index, (part, one) in pieces if len(part) or not index])


def _one(x: Tensor, own: _Weights, activation: Activation) -> Tensor:
    return F.linear(gated(activation, F.linear(x, own.w1, own.b1), F.linear(x, own.w3, own.b3)), own.w2, own.b2)


@functools.cache
def can_group(device: torch.device, dtype: torch.dtype, dim: int, hidden: int) -> bool:
    """Whether the grouped matmul takes matrices of this shape forward and backward: torch has no list of them.

    Tried in a thread of its own, where nothing sees it that watches the caller's operations, as recomputation does.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_grouped, device, dtype, dim, hidden).result()


def _try_grouped(device: torch.device, dtype: torch.dtype, dim: int, hidden: int) -> bool:
    """With an expert that gets no token: on some GPUs its gradient is whatever was in memory before."""
    offsets = torch.ones(2, dtype=torch.int32, device=device)
    try:
        for inner, outer in ((dim, hidden), (hidden, dim)):
            x = torch.zeros(1, inner, dtype=dtype, device=device, requires_grad=True)
            w = torch.zeros(2, outer, inner, dtype=dtype, device=device, requires_grad=True)
            out = F.grouped_mm(x, w.mT, offs=offsets)
            torch.full_like(w, torch.nan)  # freed at once, so that the gradient gets this memory
            out.backward(torch.zeros_like(out))
            if w.grad is None or w.grad.count_nonzero():
                return False
    except RuntimeError:
        return False
    return True
