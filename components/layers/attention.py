"""Grouped-query attention, causal, through PyTorch's fused kernels.

Without a document mask the kernel's own causal path is used, and no mask exists. With one, a boolean mask is built
once per forward and shared by all blocks: seq² bytes a row. Cutting rows at their documents would save both and was
rejected: shapes would depend on the data, which compilation, pipeline stages and equal work per rank all need them
not to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers.initialize import Init
from components.layers.norm import norm, norm_inits
from components.layers.rotary import Rotation, apply_rotary
from components.layers.shapes import AttentionShape, NormShape, Reach


def document_mask(document_ids: Tensor) -> Tensor:
    """Which key each query may see: not a later one, and none of another document.

    Args:
        document_ids: Number of each token's document. # (rows, seq)

    Returns:
        Bool mask, True where attention is allowed. # (rows, 1, seq, seq)
    """
    seq = document_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal)[:, None]


class AttentionMask(nn.Module):
    """Makes the mask that all blocks of a kind share in a forward pass. A module, so that context parallelism can
    replace it."""

    def __init__(self, reach: Reach) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, positions: Tensor, document_ids: Tensor | None) -> Tensor | None:
        """`document_mask`, or None without documents: causal attention over the whole row. # both (rows, seq)"""
        return None if document_ids is None else document_mask(document_ids)


class InnerAttention(nn.Module):
    """Attention proper: queries, keys, values in, values out. A module, so that context parallelism can wrap it."""

    def __init__(self, scale: float | None = None) -> None:
        """`scale`: what scores are multiplied with; None: 1 / √head_dim."""
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Causal attention, or attention by `mask` where there is one.

        Args:
            q: Queries. # (rows, heads, seq, head_dim)
            k: Keys; `heads` is a multiple of their heads. # (rows, kv_heads, seq, head_dim)
            v: Values. # (rows, kv_heads, seq, head_dim)
            mask: Bool, True where allowed. # (rows, 1, seq, seq)

        Returns:
            # (rows, heads, seq, head_dim)
        """
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )


class Attention(nn.Module):
    """Grouped-query self-attention of an `AttentionShape`."""

    def __init__(self, dim: int, shape: AttentionShape, norms: NormShape) -> None:
        super().__init__()
        self.shape, self.eps = shape, norms.eps
        width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.wq = nn.Linear(dim, width, bias=shape.bias)
        self.wk = nn.Linear(dim, kv_width, bias=shape.bias)
        self.wv = nn.Linear(dim, kv_width, bias=shape.bias)
        self.wo = nn.Linear(width, dim, bias=shape.out_bias)
        self.inner = InnerAttention(shape.scale)
        self.q_norm, self.k_norm = (
            norm(shape.head_dim, norms) if shape.qk_norm == "before" else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, turn: Rotation | None, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Attend within each row. # (rows, seq, dim) → (rows, seq, dim)

        `turn`: of the layer's rotary positions, None if it has none. `mask`: `AttentionMask`'s, or None for causal
        attention over the whole row. `positions`: of the tokens, int64 (rows, seq).
        """
        rows, seq, _ = x.shape
        heads = (rows, seq, -1, self.shape.head_dim)  # -1: under tensor parallelism a rank holds some of the heads
        q, k = self.q_norm(self.wq(x).view(heads)), self.k_norm(self.wk(x).view(heads))
        if turn is not None:
            q, k = apply_rotary(q, k, turn)
        v = self.wv(x).view(heads)
        out = self.inner(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(out.transpose(1, 2).reshape(rows, seq, -1))

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: matrices as said, norms as if they were not there."""
        table: dict[str, Init] = {f"{name}.weight": matrix for name in ("wq", "wk", "wv")}
        table |= {"wo.weight": into_stream}
        return table | norm_inits(self)
