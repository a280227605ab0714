"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of all heads come from one narrow
vector, as queries may do from another.

    q = wq_b(norm(wq_a x))            of each head [without positions | turned]
    c, r = wkv_a x                    the narrow vector, and the one turned key that all heads share
    k, v = wkv_b(norm(c))             k of each head [without positions], followed by r turned

In training keys and values are made of the narrow vector and attention goes on as ever. What makes it cheap in
inference, keeping c instead of keys and values and multiplying wkv_b into its neighbours, would cost more here: scores
kv_rank wide instead of head_dim.
"""

import torch
from torch import Tensor, nn

from components.layers.attention import InnerAttention, Mask
from components.layers.initialize import Init
from components.layers.norm import norm, norm_inits
from components.layers.rotary import Rotation, rotate
from components.layers.shapes import LatentShape, NormShape

NORMS = NormShape(eps=1e-6)
"""Of the narrow vectors, whatever the other norms of the model have: so are the published models."""


class LatentAttention(nn.Module):
    """Attention of a `LatentShape`."""

    def __init__(self, dim: int, shape: LatentShape) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.n_heads * shape.head_dim
        if shape.q_rank:
            self.wq_a = nn.Linear(dim, shape.q_rank, bias=False)
            self.q_norm = norm(shape.q_rank, NORMS)
            self.wq_b = nn.Linear(shape.q_rank, queries, bias=False)
        else:
            self.wq = nn.Linear(dim, queries, bias=False)
        self.wkv_a = nn.Linear(dim, shape.kv_rank + shape.rope_dim, bias=False)
        self.kv_norm = norm(shape.kv_rank, NORMS)
        self.wkv_b = nn.Linear(shape.kv_rank, shape.n_heads * (shape.nope_dim + shape.v_dim), bias=False)
        self.wo = nn.Linear(shape.n_heads * shape.v_dim, dim, bias=False)
        self.inner = InnerAttention(shape.scale)

    def forward(self, x: Tensor, turn: Rotation | None, mask: Mask, positions: Tensor) -> Tensor:
        """See `Attention.forward`. # (rows, seq, dim) → (rows, seq, dim)"""
        q, k, v = (part.transpose(1, 2) for part in self.heads(x, turn))
        out = self.inner(q, k, v, mask)
        return self.wo(out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys # (rows, seq, heads, head_dim) and values # (rows, seq, heads, v_dim)"""
        shape, of_heads = self.shape, (*x.shape[:2], -1)  # under tensor parallelism a rank holds some of the heads
        q = self.wq_b(self.q_norm(self.wq_a(x))) if shape.q_rank else self.wq(x)
        q, turned_q = q.view(*of_heads, shape.head_dim).split((shape.nope_dim, shape.rope_dim), dim=-1)
        narrow, turned_k = self.wkv_a(x).split((shape.kv_rank, shape.rope_dim), dim=-1)
        turned_k = turned_k[:, :, None]
        if turn is not None:
            turned_q, turned_k = rotate(turned_q, turn), rotate(turned_k, turn)
        both = self.wkv_b(self.kv_norm(narrow)).view(*of_heads, shape.nope_dim + shape.v_dim)
        k, v = both.split((shape.nope_dim, shape.v_dim), dim=-1)
        k = torch.cat((k, turned_k.expand(-1, -1, k.shape[2], -1)), dim=-1)
        return torch.cat((q, turned_q), dim=-1), k, v

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: see `Attention.inits`."""
        names = (name for name, part in self.named_children() if isinstance(part, nn.Linear))
        table: dict[str, Init] = {f"{name}.weight": matrix for name in names}
        return table | {"wo.weight": into_stream} | norm_inits(self)
