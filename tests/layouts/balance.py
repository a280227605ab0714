"""The balance of experts in the reference, written anew from design §4: what `components.layers.moe` injects into
gradients is a plain sum here, from the router's probabilities alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARGIN = 1e-4
"""Scores of the last expert that is chosen and of the first that is not are this far apart: nearer ones, another order
of sums could swap."""


class Experts:
    """Looks at the routers of a model with experts; of one without, at nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [module for module in model.modules() if hasattr(module, "router")]
        self.probabilities: list[Tensor] = []
        self.margin = 1.0
        self.counts = [torch.zeros(layer.n_experts) for layer in self.layers]
        for layer in self.layers:
            layer.router.register_forward_hook(lambda module, args, output: self.probabilities.append(output))

    def loss(self, positions: Tensor, valid: Tensor) -> Tensor:
        """Σ_r (T_r / T) · L_r, coefficients included, of the forward pass that was just done, with L_r = Σ_e f_e·P_e,
        f_e = E/(k·T_r) · (choices of e), P_e = mean probability of e.

        `positions`, and which tokens have labels: # (rows, seq) each
        """
        total = torch.zeros(())
        for index, (layer, probabilities) in enumerate(zip(self.layers, self.probabilities, strict=True)):
            chosen = self.choices(layer, probabilities, positions, valid)  # (rows, seq, experts), 1 where chosen
            self.counts[index] += chosen.sum((0, 1))
            for row, tokens in enumerate(valid.sum(1).tolist()):
                if tokens:
                    load = chosen[row].sum(0) * layer.n_experts / (layer.k * tokens)
                    scores = probabilities[row][valid[row]]
                    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)  # a softmax's are shares already
                    total = total + tokens / valid.sum() * layer.shape.balance_coefficient * (load * mean).sum()
        self.probabilities.clear()
        return total

    def choices(self, layer: Any, probabilities: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """1 where a token with a label goes to an expert. Raises ValueError if a choice is too close."""
        if layer.shape.force_balance:
            turn = (positions[..., None] * layer.k + torch.arange(layer.k)) % layer.n_experts
            return F.one_hot(turn, layer.n_experts).sum(-2).float() * valid[..., None]
        scores = probabilities.detach() + (0.0 if layer.expert_bias is None else layer.expert_bias)
        if layer.shape.top_groups < layer.shape.groups:
            groups = scores.unflatten(-1, (layer.shape.groups, -1))
            best = groups.topk(2, dim=-1).values.sum(-1)
            kept = self.largest(best, layer.shape.top_groups, valid)
            scores = (groups + (kept[..., None] - 1) * 1e9).flatten(-2)
        return self.largest(scores, layer.k, valid) * valid[..., None]

    def largest(self, scores: Tensor, k: int, valid: Tensor) -> Tensor:
        """1 where a score is among the k largest. Raises ValueError if that is close."""
        best = scores.sort(dim=-1, descending=True).values
        margin = float((best[..., k - 1] - best[..., k])[valid].min())
        self.margin = min(self.margin, margin)
        if margin < MARGIN:
            raise ValueError(f"the routing's margin is {margin:.2g}, less than {MARGIN}: take another seed")
        return (scores >= best[..., k - 1 : k]).float()

    @torch.no_grad()
    def step(self) -> None:
        """Bias += rate · sign(mean − count) over the tokens since the last step."""
        for layer, counts in zip(self.layers, self.counts, strict=True):
            if layer.expert_bias is not None:
                layer.expert_bias += layer.shape.bias_rate * (counts.mean() - counts).sign()
            counts.zero_()
