"""Mixture of experts: a router sends each token to k of many SwiGLU experts and adds up what they return.

No token is dropped and no expert has a capacity: tokens are sorted by expert, and one grouped matmul serves groups of
any length, empty ones too. Capacities, which would make shapes static, were rejected: what is dropped would depend on
how the batch falls to ranks.

**Balance loss.** For each row r of T_r tokens with a valid label, f_e = E/(k·T_r) · (choices of e), P_e = the mean
probability of e, and L_r = Σ_e f_e·P_e, which is 1 when all experts get the same. The objective is the cross-entropy
plus coefficient · Σ_r (T_r / valid tokens of the global batch) · L_r, summed over layers. Counts have no gradient, so
the loss is linear in the probabilities, and its gradient is known in forward: share · coefficient · f_e for each token
and expert. It is added to the probabilities' gradient on its way back. So it needs no value that travels to the
trainer, reaches every pipeline stage, and does not depend on microbatches or recomputation; and of what ranks share of
a row only integer counts are reduced, without any gradient to get wrong. The reported loss stays the cross-entropy.

**Selection bias** (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024): a bias for each expert is added to the
probabilities for choosing alone. After each step it goes up by a fixed rate where an expert got less than its share of
the global batch's tokens, and down where it got more. Tokens without a valid label are routed but not counted.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home; torch's own documentation imports it here
from torch.distributed.tensor import DTensor

from components.layers.feed_forward import FeedForward
from components.layers.initialize import Init
from components.layers.shapes import ExpertsShape, FeedForwardShape
from components.mesh.collectives import all_reduce, piece
from components.mesh.experts import TokenRanks, by_expert, combine, routed


class Routes(NamedTuple):
    """Where tokens go."""

    probabilities: Tensor
    """Softmax over all experts, fp32. # (rows, seq, experts)"""
    chosen: Tensor
    """Experts of each token, int64. # (rows, seq, k)"""


class Router(nn.Module):
    """Scores each expert for each token. The softmax is taken in fp32."""

    def __init__(self, dim: int, shape: ExpertsShape) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, shape.count, bias=shape.router_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of all experts. # (rows, seq, dim) → (rows, seq, experts)"""
        return self.gate(x).float().softmax(-1)


class Experts(nn.Module):
    """SwiGLU experts, `w2(silu(w1 x) · w3 x)` each, their matrices stacked."""

    def __init__(self, dim: int, shape: ExpertsShape) -> None:
        super().__init__()
        experts, hidden = shape.count, shape.hidden
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, dim))

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
            # (tokens, dim); only a summand of it where experts are cut along `hidden`
        """
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        dim, hidden = w2.shape[1:]
        # Without any token the kernel's backward finds no strides that it likes.
        if len(x) and not isinstance(x, FakeTensor) and can_group(x.device, x.dtype, dim, hidden):
            offsets = counts.cumsum(0).to(torch.int32)
            inner = F.silu(F.grouped_mm(x, w1.mT, offs=offsets)) * F.grouped_mm(x, w3.mT, offs=offsets)
            return F.grouped_mm(inner, w2.mT, offs=offsets)
        # Shapes without content have no counts: there all tokens go to one expert, which costs the same.
        sizes = [len(x)] if isinstance(x, FakeTensor) or not len(x) else counts.tolist()
        return _one_by_one(x, sizes, w1, w2, w3)


def _one_by_one(x: Tensor, sizes: Sequence[int], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """What grouped matmuls give, expert by expert. The first one runs even if empty, so that weights have gradients."""
    weights = zip(w1.unbind(), w2.unbind(), w3.unbind(), strict=True)
    pieces = zip(x.split(list(sizes)), weights, strict=False)
    outs = [
        F.linear(F.silu(F.linear(part, up)) * F.linear(part, gate), down)
        for index, (part, (up, down, gate)) in enumerate(pieces)
        if len(part) or not index
    ]
    return torch.cat(outs)


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


class MoE(nn.Module):
    """A mixture-of-experts layer in place of a feed-forward layer."""

    expert_bias: Tensor | None
    tokens_per_expert: Tensor | None

    def __init__(self, dim: int, shape: ExpertsShape) -> None:
        super().__init__()
        self.shape = shape
        self.n_experts, self.k = shape.count, shape.per_token
        self.router = Router(dim, shape)
        self.experts = Experts(dim, shape)
        self.shared = FeedForward(dim, FeedForwardShape(shape.shared_hidden)) if shape.shared_hidden else None
        biased = shape.selection_bias or shape.bias_rate > 0
        self.register_buffer("expert_bias", torch.zeros(shape.count, dtype=torch.float32) if biased else None)
        counts = torch.zeros(shape.count, dtype=torch.int64) if shape.bias_rate > 0 else None
        self.register_buffer("tokens_per_expert", counts, persistent=False)  # since the last step
        self.ranks = TokenRanks()

    def forward(self, x: Tensor, positions: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Route, compute, combine.

        Args:
            x: Hidden states, perhaps cut along the sequence (`TokenRanks.sequence`). # (rows, seq, dim)
            positions: Position of each token, int64. # (rows, seq)
            shares: Each token's share of the step's loss: 1 / valid tokens of the global batch, 0 without a valid
                label. None (validation): neither balance loss nor counts. # (rows, seq)

        Returns:
            Outputs (rows, seq, dim); and with a selection bias, in training, this rank's choices of each expert,
            int64 (experts,), which the caller gives to `observe`, outside of what is recomputed.
        """
        positions = piece(positions, 1, self.ranks.sequence)
        routes = self.route(x, positions)
        probabilities, seen = routes.probabilities, None
        if shares is not None and (self.shape.balance_coefficient or self.shape.bias_rate):
            shares = piece(shares, 1, self.ranks.sequence)
            counts = self.count(routes.chosen, shares > 0)
            probabilities = (
                self.balance(probabilities, counts, shares) if self.shape.balance_coefficient else probabilities
            )
            seen = counts[:, :-1].sum(0) if self.shape.bias_rate else None
        weights = probabilities.gather(-1, routes.chosen)
        if self.shape.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self.experts(x.flatten(0, 1), routes.chosen.flatten(0, 1), weights.flatten(0, 1))
        return out.view(x.shape), seen

    def route(self, x: Tensor, positions: Tensor) -> Routes:
        """Choose k experts for each token; of equal ones the first."""
        probabilities = self.router(x)
        if self.shape.force_balance:
            turn = positions[..., None] * self.k + torch.arange(self.k, device=positions.device)
            return Routes(probabilities, turn % self.n_experts)
        scores = probabilities.detach()
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        return Routes(probabilities, scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.k])

    def count(self, chosen: Tensor, valid: Tensor) -> Tensor:
        """This rank's valid choices of each expert, and valid tokens, of each row, int64. # (rows, experts + 1)"""
        rows, experts = chosen.shape[0], self.n_experts
        ones = valid[..., None].expand_as(chosen).to(torch.int64).reshape(rows, -1)
        counts = torch.zeros(rows, experts, dtype=torch.int64, device=chosen.device)
        return torch.cat((counts.scatter_add(1, chosen.reshape(rows, -1), ones), valid.sum(1, keepdim=True)), dim=1)

    def balance(self, probabilities: Tensor, counts: Tensor, shares: Tensor) -> Tensor:
        """The same probabilities; backward adds the gradient of the balance loss to theirs."""
        for axis in self.ranks.row:
            counts = all_reduce(counts, axis)
        load = counts[:, :-1] * self.n_experts / (self.k * counts[:, -1:].clamp(min=1))  # f_e, (rows, experts)
        return _AddGradient.apply(probabilities, self.shape.balance_coefficient * load[:, None] * shares[..., None])

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: experts like the feed-forward matrices that they stand for,
        the router like any other matrix."""
        experts = {"experts.w1": matrix, "experts.w2": into_stream, "experts.w3": matrix}
        shared = self.shared.inits(matrix, into_stream) if self.shared is not None else {}
        return {**experts, "router.gate.weight": matrix, **{f"shared.{name}": init for name, init in shared.items()}}

    def observe(self, counts: Tensor | None) -> None:
        """Take note of a microbatch's choices."""
        if counts is not None and self.tokens_per_expert is not None:
            self.tokens_per_expert += counts


class _AddGradient(torch.autograd.Function):
    """Identity, whose backward adds a known gradient: that of Σ x·`gradient`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (gradient,) = ctx.saved_tensors  # pyrefly: ignore[missing-attribute]
        return grad + gradient.to(grad.dtype), None


class SelectionBias:
    """Moves the selection biases of all layers of a rank after each step, from the counts of the global batch.

    Integers are added up over ranks and compared as integers, so that every layout moves every bias alike.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        layers = [module for part in parts for module in part.modules() if isinstance(module, MoE)]
        self.layers = [layer for layer in layers if layer.shape.bias_rate > 0]

    @torch.no_grad()
    def step(self) -> None:
        """Bias += rate · sign(mean count − count), once the parameters have moved. Collective."""
        if not self.layers:
            return
        counts = torch.stack([layer.tokens_per_expert for layer in self.layers if layer.tokens_per_expert is not None])
        for axis in self.layers[0].ranks.batch:
            counts = all_reduce(counts, axis)
        lacking = counts.sum(1, keepdim=True) - counts * counts.shape[1]  # (mean − count) · experts
        for layer, sign in zip(self.layers, lacking.sign(), strict=True):
            if layer.expert_bias is not None:
                layer.expert_bias += layer.shape.bias_rate * sign

    def reset(self) -> None:
        """Forget the counts: another step begins, or this one was skipped."""
        for layer in self.layers:
            if layer.tokens_per_expert is not None:
                layer.tokens_per_expert.zero_()
