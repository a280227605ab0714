"""The router of a mixture of experts: scores of all experts, the choice of k, and what they weigh.

A token's experts are chosen by their scores, plus a selection bias where there is one, from all experts or from the
best groups of them (DeepSeek-V2 and V3, "group-limited" routing). Weights are the scores themselves: a bias chooses and
does not weigh.

Scores are fp32. With a softmax the matrix is multiplied in the type of compute, as the published models do. With a
sigmoid it is multiplied in fp32, as DeepSeek-V3 does: its scores lie close together and its bias moves by 0.001, less
than what bfloat16 can tell apart. The price is a copy of the hidden states in fp32, which recomputation frees, and
experts / (3 · dim) of one expert's FLOPs at the slower rate; fp32 for all was rejected, since it buys softmax routers
nothing that those models were trained with.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers.shapes import ExpertsShape

TINY = 1e-20
"""Added to sums of sigmoids that something is divided by, which may all be 0; softmax has no such case."""


class Routes(NamedTuple):
    """Where tokens go."""

    scores: Tensor
    """Scores of all experts, fp32; with a softmax they are probabilities. # (rows, seq, experts)"""
    chosen: Tensor
    """Experts of each token, int64. # (rows, seq, k)"""


class Router(nn.Module):
    """Scores each expert for each token."""

    def __init__(self, dim: int, shape: ExpertsShape) -> None:
        super().__init__()
        self.score = shape.score
        kind = ExactLinear if shape.score == "sigmoid" else nn.Linear
        self.gate = kind(dim, shape.count, bias=shape.router_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all experts, fp32. # (rows, seq, dim) → (rows, seq, experts)"""
        logits = self.gate(x).float()
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)


class ExactLinear(nn.Linear):
    """A linear layer that computes in fp32 whatever the type of its input and of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """# (..., in) → (..., out), fp32"""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


def choose(scores: Tensor, shape: ExpertsShape) -> Tensor:
    """The experts of each token, the best first; of equal ones the first. # (..., experts) → (..., k), int64"""
    if shape.top_groups < shape.groups:
        scores = _within_groups(scores, shape)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., : shape.per_token]


def _within_groups(scores: Tensor, shape: ExpertsShape) -> Tensor:
    """The same scores, -∞ outside of each token's best groups; of equal groups the first."""
    grouped = scores.unflatten(-1, (shape.groups, -1))
    best = grouped.amax(-1) if shape.group_score == "max" else grouped.topk(2).values.sum(-1)
    others = best.sort(dim=-1, descending=True, stable=True).indices[..., shape.top_groups :]
    closed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, others, True)
    return grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)


def weigh(routes: Routes, shape: ExpertsShape) -> Tensor:
    """Weights of each token's experts, fp32. # (rows, seq, k)"""
    weights = routes.scores.gather(-1, routes.chosen)
    if shape.normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + TINY if shape.score == "sigmoid" else total)
    return weights if shape.scale == 1.0 else weights * shape.scale
