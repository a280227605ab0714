"""Grouped-query attention, causal, through PyTorch's fused kernels.

Where attention is causal and no more, the kernel's own causal path is used, and no mask exists. Documents, windows and
chunks are said by a mask, built once per forward and shared by all blocks of the same reach. On CUDA it is a block mask
(`block_mask`), and what it empties is skipped. Elsewhere, where ranks share rows, and where there are sinks it is a
boolean mask: seq² bytes, with documents for each row, and what it empties is computed all the same. Cutting rows at
their documents would save both and was rejected: shapes would depend on the data, which compilation, pipeline stages
and equal work per rank all need them not to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers import block_mask
from components.layers.block_mask import Blocks
from components.layers.initialize import Constant, Init
from components.layers.norm import norm, norm_inits, unweighted_norm
from components.layers.rotary import Rotation, apply_rotary
from components.layers.shapes import AttentionShape, LatentShape, NormShape, Reach, Temperature
from components.mesh.attention_kernels import for_all_heads
from components.mesh.batch import Part
from components.mesh.tiled_attention import Tiling, single, tiled_attention

Mask = Tensor | Blocks | None
"""Which keys each query may see. None: causal attention over whole rows."""


class AttentionMask(nn.Module):
    """Makes the mask that all blocks of a kind share in a forward pass. A module, so that context parallelism can
    replace it."""

    def __init__(self, reach: Reach, in_blocks: bool = False) -> None:
        """`in_blocks`: all attention that gets the mask can take a block mask (`takes_blocks`)."""
        super().__init__()
        self.reach, self.in_blocks = reach, in_blocks

    def forward(self, positions: Tensor, document_ids: Tensor | None, part: Part | None = None) -> Mask:
        """Which keys each query may see: not later ones, of its own document, within the reach.

        Args:
            positions: Of the queries' tokens, in their documents; without documents only its shape matters, and
                positions are places in the row. # (rows, queries)
            document_ids: Number of each query's document; None: each row is one. # (rows, queries)
            part: Where in longer rows the queries stand; None: they are the whole rows.

        Returns:
            Bool mask, True where attention is allowed # (rows or 1, 1, queries, seq), or for whole rows, where the
            device has a kernel for it, a block mask, or None: causal attention over whole rows.
        """
        length = positions.shape[1] if part is None else part.length
        window, chunk = (_less(limit, length) for limit in (self.reach.window, self.reach.chunk))
        if document_ids is None and window is None and chunk is None:
            return None
        if part is None and self.in_blocks and block_mask.usable(positions):
            return block_mask.blocks(positions, document_ids, window, chunk)
        part = part or Part(torch.arange(length, device=positions.device), length, _as_it_is)
        allowed = part.not_later()[None]
        if document_ids is not None:
            allowed = allowed & (document_ids[:, :, None] == part.whole(document_ids)[:, None, :])
        if window is not None or chunk is not None:
            query, key = _places(positions, document_ids is not None, part)
            if window is not None:
                allowed = allowed & (query - key < window)
            if chunk is not None:
                allowed = allowed & (query // chunk == key // chunk)
        return allowed[:, None]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _less(limit: int | None, length: int) -> int | None:
    """The limit, where rows are long enough to meet it."""
    return limit if limit is not None and limit < length else None


def _places(positions: Tensor, documents: bool, part: Part) -> tuple[Tensor, Tensor]:
    """Positions of queries # (rows or 1, queries, 1) and of keys. # (rows or 1, 1, seq)"""
    if documents:
        return positions[:, :, None], part.whole(positions)[:, None, :]
    return part.index[None, :, None], torch.arange(part.length, device=part.index.device)[None, None, :]


def takes_blocks(shape: AttentionShape | LatentShape) -> bool:
    """Whether attention of this shape can take a block mask: no sinks, no heads narrower than the kernels'."""
    if isinstance(shape, LatentShape):
        return min(shape.head_dim, shape.v_dim) >= block_mask.LEAST_WIDTH
    return not shape.sinks and shape.head_dim >= block_mask.LEAST_WIDTH


class InnerAttention(nn.Module):
    """Attention proper: queries, keys, values in, values out. A module, so that context parallelism can wrap it."""

    def __init__(self, scale: float | None = None) -> None:
        """`scale`: what scores are multiplied with; None: 1 / √head_dim."""
        super().__init__()
        self.scale = scale

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask = None,
        sinks: Tensor | None = None,
        tiling: Tiling | None = None,
    ) -> Tensor:
        """Causal attention, or attention by `mask` where there is one.

        With sinks, on a device without a kernel for it (see `attention_kernels`: on CUDA, with a mask), it holds
        512 × seq numbers in fp32 for each head (`single`), several times in backward.

        Args:
            q: Queries. # (rows, heads, seq, head_dim)
            k: Keys; `heads` is a multiple of their heads. # (rows, kv_heads, keys, head_dim)
            v: Values. # (rows, kv_heads, keys, value_dim)
            mask: Bool, True where allowed # (rows or 1, 1, seq, keys), or blocks, with neither sinks nor tiling.
            sinks: Score of each head's sink (`tiled_attention`); None: there are none. # (heads,)
            tiling: How ranks that share rows put attention together; None: every query meets all keys, which are here.

        Returns:
            # (rows, heads, seq, value_dim)
        """
        if isinstance(mask, Blocks):
            return block_mask.attend(q, k, v, mask.mask, self.scale)
        if sinks is not None or tiling is not None:
            tiling = tiling or single(q.shape[2], k.shape[2], causal=mask is None)
            return tiled_attention(q, k, v, mask, tiling, self.scale, sinks)
        if mask is not None and q.device.type == "cuda":  # no fused kernel there takes both a mask and shared keys
            k, v = for_all_heads(q, k), for_all_heads(q, v)
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
        self.sinks = nn.Parameter(torch.empty(shape.n_heads)) if shape.sinks else None

    def forward(self, x: Tensor, turn: Rotation | None, mask: Mask, positions: Tensor) -> Tensor:
        """Attend within each row. # (rows, seq, dim) → (rows, seq, dim)

        `turn`: of the layer's rotary positions, None if it has none. `mask`: `AttentionMask`'s, or None for causal
        attention over the whole row. `positions`: of the tokens, int64 (rows, seq).
        """
        rows, seq, _ = x.shape
        heads = (rows, seq, -1, self.shape.head_dim)  # -1: under tensor parallelism a rank holds some of the heads
        q, k = self.q_norm(self.wq(x).view(heads)), self.k_norm(self.wk(x).view(heads))
        if turn is not None:
            q, k = apply_rotary(q, k, turn)
            if self.shape.qk_norm == "after":
                q, k = unweighted_norm(q, self.eps), unweighted_norm(k, self.eps)
        elif self.shape.temperature is not None:
            q = tempered(q, positions, self.shape.temperature)
        v = self.wv(x).view(heads)
        out = self.inner(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.sinks)
        return self.wo(out.transpose(1, 2).reshape(rows, seq, -1))

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How each parameter is initialized, by name: matrices as said, norms as if they were not there, biases 0, and
        sinks too: their score is that of a key that a query has nothing in common with."""
        table: dict[str, Init] = {f"{name}.weight": matrix for name in ("wq", "wk", "wv")}
        table |= {"wo.weight": into_stream}
        zeros = (name for name, _ in self.named_parameters() if name == "sinks" or name.endswith(".bias"))
        return table | {name: Constant(0.0) for name in zeros} | norm_inits(self)


def tempered(q: Tensor, positions: Tensor, temperature: Temperature) -> Tensor:
    """Queries scaled by position, in fp32, returned in their own type. # (rows, seq, heads, head_dim), (rows, seq)"""
    steps = ((positions.float() + 1.0) / temperature.floor).floor()
    return (q * (steps.log1p() * temperature.scale + 1.0)[:, :, None, None]).type_as(q)
