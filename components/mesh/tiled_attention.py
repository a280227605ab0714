"""Attention put together from tiles: some queries against some keys at a time, while keys travel from rank to rank.

Softmax over all keys is a mean of softmaxes over some of them, weighted by e to the log of their sums of exponentials
(`lse`). So each tile is computed by a fused kernel that tells its lse, and tiles are merged in fp32. Backward needs no
merging: with the lse and the output of the whole, a kernel's backward gives the tile's exact share of each gradient.

A sink, a learned score without a value that takes part in a head's softmax, is one more summand of the lse: the output
shrinks by its share, backward of the tiles stays as it is, and the sink's own gradient follows from what is at hand.
That is why this stands on the ground floor: one rank alone needs it too, with a single tile. To give the fused kernels
a key with a score of its own was rejected: it takes a mask of numbers for every head.

Keys and values travel as they are, before grouped queries share them; the gradients of keys and values travel along
behind them in fp32, and come home after a whole turn. Torch's own ring attention was rejected: it is private, works on
DTensors, and knows neither document masks nor the CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.mesh.attention_kernels import tile_backward, tile_forward
from components.mesh.collectives import Axis
from components.runtime.errors import MeshError


class Tile(NamedTuple):
    """A rectangle of attention: some queries of this rank against some keys that it has at hand."""

    query: int
    """First query."""
    queries: int
    """Number of queries."""
    key: int
    """First key, counted in the keys at hand."""
    keys: int
    """Number of keys."""
    column: int
    """Where the first key stands in the row."""
    causal: bool
    """The keys are the queries' own tokens, and each query sees those up to itself; else it sees all."""

    def of_queries(self, x: Tensor) -> Tensor:
        """Its part of what each query has. # (rows, heads, all queries, ...) → (rows, heads, queries, ...)"""
        return x.narrow(2, self.query, self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        """Its part of what each key at hand has. # (rows, heads, all keys, ...) → (rows, heads, keys, ...)"""
        return x.narrow(2, self.key, self.keys)

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """Its part of a mask over the row. # (rows, 1, all queries, seq) → (rows, 1, queries, keys)"""
        return None if mask is None else self.of_queries(mask).narrow(3, self.column, self.keys)


Steps = tuple[tuple[Tile, ...], ...]


class Tiling(NamedTuple):
    """How attention is put together."""

    steps: Steps
    """The tiles of each step; with one step nothing travels, else there are as many as ranks."""
    axis: Axis | None = None
    """The ranks, where keys travel; its `rank` is a plain integer."""


BLOCK = 512
"""Queries of a tile where there is a mask."""


def single(queries: int, keys: int, causal: bool) -> Tiling:
    """All queries against all keys; with a mask (not `causal`), for which not every device has a kernel, some queries
    at a time, so that plain operations hold block × keys numbers for each head instead of queries × keys."""
    block = queries if causal else BLOCK
    starts = range(0, queries, block)
    return Tiling((tuple(Tile(at, min(block, queries - at), 0, keys, 0, causal) for at in starts),))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tiling: Tiling,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries. The keys at hand move on to the next rank after each step but the last.

    Args:
        q: # (rows, heads, queries, head_dim)
        k: Keys at hand at the first step; `heads` is a multiple of their heads. # (rows, kv_heads, keys, head_dim)
        v: # (rows, kv_heads, keys, value_dim)
        mask: Bool, True where allowed, over the whole row; each query must see a key of its first tile.
            None: what the tiles say. # (rows or 1, 1, queries, seq)
        tiling: The tiles.
        scale: What scores are multiplied with; None: 1 / √head_dim.
        sinks: Score of each head's sink, which takes part in the softmax and has no value; None: there are none.
            Their gradient, summed over queries in fp32, is of this rank's queries. # (heads,)

    Returns:
        # (rows, heads, queries, value_dim)
    """
    return _TiledAttention.apply(q, k, v, mask, sinks, tiling, scale)


_ops = torch.ops._c10d_functional  # as in collectives; here the wait comes later, so that compute hides the transfer


Pair = tuple[Tensor, Tensor]
"""Keys and values, or their gradients; or an output and its lse."""


def _send_on(x: Tensor, axis: Axis | None) -> Tensor:
    """Begin to send a flat `x` to the next rank, and to receive as much from the one before; `wait_tensor` ends it."""
    if axis is None:
        raise MeshError("attention in several steps needs ranks that keys travel between")
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sent = [x.numel() if rank == to else 0 for rank in range(axis.size)]
    received = [x.numel() if rank == source else 0 for rank in range(axis.size)]
    return _ops.all_to_all_single(x, received, sent, axis.name)


def _flat(kv: Pair) -> Tensor:
    return torch.cat((kv[0].reshape(-1), kv[1].reshape(-1)))


def _pair(flat: Tensor, like: Pair) -> Pair:
    """The inverse of `_flat`, as views."""
    k, v = flat.split((like[0].numel(), like[1].numel()))
    return k.view(like[0].shape), v.view(like[1].shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        tiling: Tiling,
        scale: float | None,
    ) -> Tensor:
        ctx.tiling, ctx.scale = tiling, scale
        out, lse = _forward(q, (k, v), mask, tiling, scale)
        if sinks is not None:
            out, lse = _with_sinks(out, lse, sinks)
        if out.dtype != q.dtype:  # where `to` has nothing to do, torch 2.11 compiles it to an output without a gradient
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, sinks, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        q, k, v, mask, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward((grad, q, out, lse), (k, v), mask, ctx.tiling, ctx.scale)
        d_sinks = None if sinks is None else _gradient_of_sinks(grad, out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, d_sinks, None, None


def _forward(q: Tensor, kv: Pair, mask: Tensor | None, tiling: Tiling, scale: float | None) -> Pair:
    """The whole's output and lse, in fp32."""
    at_hand, last = kv, len(tiling.steps) - 1
    flat = _flat(kv) if last else None
    merged: dict[int, Pair] = {}  # by first query
    for step, tiles in enumerate(tiling.steps):
        pending = _send_on(flat, tiling.axis) if flat is not None and step < last else None
        for tile in tiles:
            k, v = (tile.of_keys(x) for x in at_hand)
            found = tile_forward(tile.of_queries(q), k, v, tile.of_mask(mask), tile.causal and mask is None, scale)
            merged[tile.query] = _merge(merged[tile.query], found) if tile.query in merged else found
        if pending is not None:
            flat = _ops.wait_tensor(pending)
            at_hand = _pair(flat, kv)
    outs, lses = zip(*(merged[start] for start in sorted(merged)), strict=True)
    lse = torch.cat(lses, dim=2)
    if flat is not None and not tiling.steps[-1]:
        # Nothing here needs these keys, but compiled recomputation must move them all the same: others need theirs.
        lse = lse + flat[:0].sum()
    return torch.cat(outs, dim=2), lse


def _backward(
    saved: tuple[Tensor, ...], kv: Pair, mask: Tensor | None, tiling: Tiling, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in fp32. `saved`: the output's gradient, q, output, lse."""
    at_hand, last, dtype = kv, len(tiling.steps) - 1, saved[3].dtype
    flat, dq = _flat(kv) if last else None, torch.zeros_like(saved[1], dtype=dtype)
    home = dq.new_empty(0)  # nothing is on its way yet
    for step, tiles in enumerate(tiling.steps):
        pending = _send_on(flat, tiling.axis) if flat is not None and step < last else None
        shares = dq.new_zeros(kv[0].numel() + kv[1].numel())
        for tile in tiles:
            _add_gradients((dq, *_pair(shares, kv)), saved, at_hand, mask, tile, scale)
        total = shares + _ops.wait_tensor(home) if step else shares
        home = _send_on(total, tiling.axis) if last else total
        if pending is not None:
            flat = _ops.wait_tensor(pending)
            at_hand = _pair(flat, kv)
    return dq, *_pair(_ops.wait_tensor(home) if last else home, kv)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse with sinks in the softmax. # out (rows, heads, queries, value_dim), sinks (heads,)"""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out * (lse - total).exp()[..., None], total


def _gradient_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The softmax's backward, for a score whose value is 0. # (heads,)"""
    probabilities = (sinks.to(lse.dtype)[:, None] - lse).exp()
    inner = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(probabilities * inner).sum((0, 2)).to(sinks.dtype)


def _merge(one: Pair, other: Pair) -> Pair:
    """Output and lse over the keys of two tiles."""
    total = torch.logaddexp(one[1], other[1])
    weights = (one[1] - total).exp()[..., None], (other[1] - total).exp()[..., None]
    return one[0] * weights[0] + other[0] * weights[1], total


def _add_gradients(
    gradients: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    kv: Pair,
    mask: Tensor | None,
    tile: Tile,
    scale: float | None,
) -> None:
    """Add a tile's shares to the gradients of q, k, v. `saved`: the output's gradient, q, output, lse."""
    grad, q, out, lse = (tile.of_queries(x) for x in saved)
    k, v = (tile.of_keys(x) for x in kv)
    shares = tile_backward(grad, q, out, lse, k, v, tile.of_mask(mask), tile.causal and mask is None, scale)
    for gradient, share, part in zip(gradients, shares, (tile.of_queries, tile.of_keys, tile.of_keys), strict=True):
        part(gradient).add_(share)
