"""The feed-forward part of a block: SwiGLU, `w2(silu(w1 x) · w3 x)`, without biases.

w1 and w3 stay two matrices, as in published checkpoints; one fused matrix would spare a kernel launch and cost a name
table that splits, and a tensor-parallel cut that interleaves.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """# (rows, seq, dim) → (rows, seq, dim)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
