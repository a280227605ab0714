"""Grouped-query attention, causal, through PyTorch's fused kernels.

Without a document mask the kernel's own causal path is used, and no mask exists. With one, a boolean mask is built
once per forward and shared by all blocks: seq² bytes a row. Cutting rows at their documents would save both and was
rejected: shapes would depend on the data, which compilation, pipeline stages and equal work per rank all need them
not to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers.rotary import Rotation, apply_rotary


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
    """Makes the mask that all blocks of a forward pass share. A module, so that context parallelism can replace it."""

    def forward(self, document_ids: Tensor | None) -> Tensor | None:
        """`document_mask`, or None without documents: causal attention over the whole row. # (rows, seq)"""
        return None if document_ids is None else document_mask(document_ids)


class InnerAttention(nn.Module):
    """Attention proper: queries, keys, values in, values out. A module, so that context parallelism can wrap it."""

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
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """Rotary grouped-query self-attention without biases."""

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm_eps: float | None = None
    ) -> None:
        """Sizes. With `qk_norm_eps` each head's queries and keys are normed before they are turned."""
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.inner = InnerAttention()
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, eps=qk_norm_eps) for _ in range(2)
        )

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """Attend within each row. # (rows, seq, dim) → (rows, seq, dim)

        `mask` is `document_mask`'s, or None for causal attention over the whole row.
        """
        rows, seq, _ = x.shape
        heads = (rows, seq, -1, self.head_dim)  # -1: under tensor parallelism a rank holds some of the heads
        q, k = self.q_norm(self.wq(x).view(heads)), self.k_norm(self.wk(x).view(heads))
        q, k = apply_rotary(q, k, turn)
        v = self.wv(x).view(heads)
        out = self.inner(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(out.transpose(1, 2).reshape(rows, seq, -1))
