"""The feed-forward part of a block: `w2(act(w1 x) · w3 x)`, without biases; with silu, SwiGLU.

w1 and w3 stay two matrices, as in published checkpoints; one fused matrix would spare a kernel launch and cost a name
table that splits, and a tensor-parallel cut that interleaves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers.initialize import Init
from components.layers.shapes import CLAMP, SLOPE, Activation, FeedForwardShape


def gated(activation: Activation, gate: Tensor, value: Tensor) -> Tensor:
    """What goes into w2, from what comes out of w1 and of w3. # all (..., hidden)"""
    if activation == "silu":
        return F.silu(gate) * value
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * value
    gate = gate.clamp(max=CLAMP)
    return (value.clamp(-CLAMP, CLAMP) + 1.0) * (gate * torch.sigmoid(gate * SLOPE))


class FeedForward(nn.Module):
    """Two matrices in, a gate, one matrix out."""

    def __init__(self, dim: int, shape: FeedForwardShape) -> None:
        super().__init__()
        self.activation = shape.activation
        self.w1 = nn.Linear(dim, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """# (rows, seq, dim) → (rows, seq, dim)"""
        return self.w2(gated(self.activation, self.w1(x), self.w3(x)))

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name."""
        return {"w1.weight": matrix, "w2.weight": into_stream, "w3.weight": matrix}
