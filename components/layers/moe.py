"""Mixture of experts: a router sends each token to k of many experts and adds up what they return, and perhaps what a
shared expert says of every token.

No token is dropped and no expert has a capacity: tokens are sorted by expert, and experts take groups of any length.
Capacities, which would make shapes static, were rejected: what is dropped would depend on how the batch falls to ranks.

**Balance loss.** For each row r of T_r tokens with a valid label, f_e = E/(k·T_r) · (choices of e), P_e = the mean
probability of e, and L_r = Σ_e f_e·P_e, which is 1 when all experts get the same. The objective is the cross-entropy
plus coefficient · Σ_r (T_r / valid tokens of the global batch) · L_r, summed over layers. Counts have no gradient, so
the loss is linear in the probabilities, and its gradient is known in forward: share · coefficient · f_e for each token
and expert. Sigmoid scores s have the probabilities p = s / Σ s (DeepSeek-V3's sequence-wise loss), and the gradient
share · coefficient · (f_e − Σ f·p) / Σ s. It is added to the scores' gradient on its way back. So it needs no value
that travels to the trainer, reaches every pipeline stage, and does not depend on microbatches or recomputation; and of
what ranks share of a row only integer counts are reduced, without any gradient to get wrong. The reported loss stays
the cross-entropy.

**Selection bias** (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024): a bias for each expert is added to the
scores for choosing alone. After each step it goes up by a fixed rate where an expert got less than its share of the
global batch's tokens, and down where it got more; at rate 0 it stays as it was loaded. Tokens without a valid label are
routed but not counted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.layers.experts import Experts
from components.layers.feed_forward import FeedForward
from components.layers.initialize import Constant, Init
from components.layers.router import TINY, Router, Routes, choose, weigh
from components.layers.shapes import ExpertsShape, FeedForwardShape
from components.mesh.collectives import all_reduce, piece
from components.mesh.experts import TokenRanks


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
        shared = FeedForwardShape(shape.shared_hidden, shape.activation)
        self.shared = FeedForward(dim, shared) if shape.shared_hidden else None
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
        routes, seen = self.route(x, positions), None
        if shares is not None and (self.shape.balance_coefficient or self.shape.bias_rate):
            shares = piece(shares, 1, self.ranks.sequence)
            counts = self.count(routes.chosen, shares > 0)
            if self.shape.balance_coefficient:
                routes = routes._replace(scores=self.balance(routes.scores, counts, shares))
            seen = counts[:, :-1].sum(0) if self.shape.bias_rate else None
        weights = weigh(routes, self.shape)
        # First, so that backward comes to the experts before it needs anything that is recomputed: by then FSDP has
        # gathered them for backward, and its hooks stay out of the recomputation, which would miss what they did.
        shared = None if self.shared is None else self.shared(x)
        out = self.mix(x.flatten(0, 1), routes.chosen.flatten(0, 1), weights.flatten(0, 1)).view(x.shape)
        return out if shared is None else out + shared, seen

    def route(self, x: Tensor, positions: Tensor) -> Routes:
        """Choose k experts for each token; of equal ones the first."""
        scores = self.router(x)
        if self.shape.force_balance:
            turn = positions[..., None] * self.k + torch.arange(self.k, device=positions.device)
            return Routes(scores, turn % self.n_experts)
        biased = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        return Routes(scores, choose(biased, self.shape))

    def mix(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, or the sum of experts of the weighted token (`scale_input`): each
        choice then goes its way as a token of its own, which `experts` and whoever deals them need not know of.

        # tokens (tokens, dim), experts and weights (tokens, k) → (tokens, 1, dim) or (tokens, dim)
        """
        if not self.shape.scale_input:
            return self.experts(x, chosen, weights)
        scaled = x[:, None] * weights[..., None].to(x.dtype)  # (tokens, k, dim)
        ones = torch.ones_like(weights).view(-1, 1)
        return self.experts(scaled.flatten(0, 1), chosen.reshape(-1, 1), ones).view(scaled.shape).sum(1)

    def count(self, chosen: Tensor, valid: Tensor) -> Tensor:
        """This rank's valid choices of each expert, and valid tokens, of each row, int64. # (rows, experts + 1)"""
        rows, experts = chosen.shape[0], self.n_experts
        ones = valid[..., None].expand_as(chosen).to(torch.int64).reshape(rows, -1)
        counts = torch.zeros(rows, experts, dtype=torch.int64, device=chosen.device)
        return torch.cat((counts.scatter_add(1, chosen.reshape(rows, -1), ones), valid.sum(1, keepdim=True)), dim=1)

    def balance(self, scores: Tensor, counts: Tensor, shares: Tensor) -> Tensor:
        """The same scores; backward adds the gradient of the balance loss to theirs."""
        for axis in self.ranks.row:
            counts = all_reduce(counts, axis)
        load = counts[:, :-1] * self.n_experts / (self.k * counts[:, -1:].clamp(min=1))  # f_e, (rows, experts)
        gradient = load[:, None]
        if self.shape.score == "sigmoid":
            total = scores.detach().sum(-1, keepdim=True) + TINY
            gradient = (gradient - (gradient * scores.detach() / total).sum(-1, keepdim=True)) / total
        return _AddGradient.apply(scores, self.shape.balance_coefficient * gradient * shares[..., None])

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: experts like the feed-forward matrices that they stand for, the
        router like any other matrix, biases as zeros."""
        table: dict[str, Init] = {"router.gate.weight": matrix}
        if self.shape.router_bias:
            table["router.gate.bias"] = Constant(0.0)
        for part, layer in (("experts", self.experts), ("shared", self.shared)):
            if layer is not None:
                table |= {f"{part}.{name}": init for name, init in layer.inits(matrix, into_stream).items()}
        return table

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
    """Moves the selection biases of a rank's layers after each step, from the counts of the global batch. Layers whose
    bias does not move, or that have none, are left alone; others may differ in their number of experts.

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
        counts = torch.cat([layer.tokens_per_expert for layer in self.layers if layer.tokens_per_expert is not None])
        for axis in self.layers[0].ranks.batch:
            counts = all_reduce(counts, axis)
        for layer, own in zip(self.layers, counts.split([layer.n_experts for layer in self.layers]), strict=True):
            if layer.expert_bias is not None:
                lacking = own.sum() - own * layer.n_experts  # (mean − count) · experts
                layer.expert_bias += layer.shape.bias_rate * lacking.sign()

    def reset(self) -> None:
        """Forget the counts: another step begins, or this one was skipped."""
        for layer in self.layers:
            if layer.tokens_per_expert is not None:
                layer.tokens_per_expert.zero_()
