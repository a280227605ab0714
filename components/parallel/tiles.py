"""Attention put together from tiles: some queries against some keys at a time, while keys travel from rank to rank.

Softmax over all keys is a mean of softmaxes over some of them, weighted by e to the log of their sums of exponentials
(`lse`). So each tile is computed by a fused kernel that tells its lse, and tiles are merged in fp32. Backward needs no
merging: with the lse and the output of the whole, a kernel's backward gives the tile's exact share of each gradient.

Keys and values travel as they are, before grouped queries share them; the gradients of keys and values travel along
behind them in fp32, and come home after a whole turn. Torch's own ring attention was rejected: it is private, works on
DTensors, and knows neither document masks nor the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from components.mesh.collectives import Axis
from components.parallel.chunks import Tile
from components.parallel.kernels import tile_backward, tile_forward

Steps = tuple[tuple[Tile, ...], ...]


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, steps: Steps, axis: Axis) -> Tensor:
    """Attention of this rank's queries. The keys at hand move on to the next rank after each step but the last.

    Args:
        q: # (rows, heads, queries, head_dim)
        k: Keys at hand at the first step; `heads` is a multiple of their heads. # (rows, kv_heads, keys, head_dim)
        v: # (rows, kv_heads, keys, head_dim)
        mask: Bool, True where allowed, over the whole row; each query must see a key of its first tile.
            None: what the tiles say. # (rows, 1, queries, seq)
        steps: The tiles of each step; with one step nothing travels, else there are as many as ranks.
        axis: The ranks; its `rank` is a plain integer.

    Returns:
        # (rows, heads, queries, head_dim)
    """
    return _TiledAttention.apply(q, k, v, mask, steps, axis)


_ops = torch.ops._c10d_functional  # as in collectives; here the wait comes later, so that compute hides the transfer


def _send_on(x: Tensor, axis: Axis) -> Tensor:
    """Begin to send `x` to the next rank, and to receive as much from the one before; `_arrived` ends it."""
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sent = [x.numel() if rank == to else 0 for rank in range(axis.size)]
    received = [x.numel() if rank == source else 0 for rank in range(axis.size)]
    return _ops.all_to_all_single(x.reshape(-1), received, sent, axis.name)


def _arrived(pending: Tensor, like: Tensor) -> Tensor:
    return _ops.wait_tensor(pending).view(like.shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, steps: Steps, axis: Axis) -> Tensor:
        ctx.steps, ctx.axis, ctx.widths = steps, axis, (k.shape[-1], v.shape[-1])
        kv = torch.cat((k, v), dim=-1)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for step, tiles in enumerate(steps):
            pending = _send_on(kv, axis) if step + 1 < len(steps) else None
            for tile in tiles:
                _add_tile(merged, q, kv.split(ctx.widths, dim=-1), mask, tile)
            kv = kv if pending is None else _arrived(pending, kv)
        out = torch.cat([merged[start][0] for start in sorted(merged)], dim=2)
        if out.dtype != q.dtype:  # where `to` has nothing to do, torch 2.11 compiles it to an output without a gradient
            out = out.to(q.dtype)
        lse = torch.cat([merged[start][1] for start in sorted(merged)], dim=2)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        q, k, v, mask, out, lse = ctx.saved_tensors
        kv, last = torch.cat((k, v), dim=-1), len(ctx.steps) - 1
        dq, dkv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        home: Tensor | None = None
        for step, tiles in enumerate(ctx.steps):
            pending = _send_on(kv, ctx.axis) if step < last else None
            shares = torch.zeros_like(dkv)
            keys, values = kv.split(ctx.widths, dim=-1)
            for tile in tiles:
                _add_gradients((dq, *shares.split(ctx.widths, dim=-1)), (grad, q, out, lse), (keys, values), mask, tile)
            dkv = shares if home is None else shares + _arrived(home, shares)
            home = _send_on(dkv, ctx.axis) if last else None
            kv = kv if pending is None else _arrived(pending, kv)
        dk, dv = (dkv if home is None else _arrived(home, dkv)).split(ctx.widths, dim=-1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _add_tile(
    merged: dict[int, tuple[Tensor, Tensor]], q: Tensor, kv: tuple[Tensor, ...], mask: Tensor | None, tile: Tile
) -> None:
    """Merge a tile into the outputs and lse so far, by first query; outputs in fp32."""
    k, v = (tile.of_keys(x) for x in kv)
    out, lse = tile_forward(tile.of_queries(q), k, v, tile.of_mask(mask), tile.causal and mask is None)
    merged[tile.query] = _merge(merged[tile.query], out, lse) if tile.query in merged else (out, lse)


def _merge(so_far: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(so_far[1], lse)
    weights = (so_far[1] - total).exp()[..., None], (lse - total).exp()[..., None]
    return so_far[0] * weights[0] + out * weights[1], total


def _add_gradients(
    gradients: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    kv: tuple[Tensor, Tensor],
    mask: Tensor | None,
    tile: Tile,
) -> None:
    """Add a tile's shares to the gradients of q, k, v. `saved`: the output's gradient, q, output, lse."""
    grad, q, out, lse = (tile.of_queries(x) for x in saved)
    k, v = (tile.of_keys(x) for x in kv)
    shares = tile_backward(grad, q, out, lse, k, v, tile.of_mask(mask), tile.causal and mask is None)
    for gradient, share, part in zip(gradients, shares, (tile.of_queries, tile.of_keys, tile.of_keys), strict=True):
        part(gradient).add_(share)
