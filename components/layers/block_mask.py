"""Attention by a block mask: what documents, windows and chunks empty is neither stored nor computed.

Torch's flex attention compiles a kernel from a function that says who sees whom, and asks it only in blocks that a mask
cuts through; blocks that it empties are skipped. So a mask costs (seq / 128)² numbers instead of seq² bytes, and keys
stay shared by their queries. A block mask is made of the first and last token of each block alone, since documents and
chunks are runs of tokens; `create_block_mask` gives the same from a mask of seq² and was rejected for it, compiled too:
it would compile anew for each length.

`varlen_attn`, which cuts rows at documents, was rejected: half precision only, no values narrower than keys, no chunks,
and its table of documents has a size that depends on the data.

On CUDA only: on a CPU flex attention has no compiled backward, and `scaled_dot_product_attention` takes masks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from components.runtime.logging import logger

BLOCK = 128
"""Tokens of a block, a side."""
LEAST_WIDTH = 16
"""Of queries and of values: what the kernels take."""
WRAPPED = "wrap_inductor_compiled_regions"
"""The compiler's option that shows selective recomputation the compiled kernel as one operation, which it may keep."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block mask, in a shell that FSDP and recomputation pass on as it is, instead of rebuilding it for each block
    of the model."""

    mask: BlockMask
    """# (rows or 1, 1, seq, seq)"""


def blocks(positions: Tensor, document_ids: Tensor | None, window: int | None, chunk: int | None) -> Blocks:
    """The block mask of whole rows: see `AttentionMask.forward`. Documents must be runs of tokens, with positions from
    0 on. # (rows, seq), (rows, seq)"""
    segments = _segments(positions, document_ids, chunk)
    some, full = _touched(segments, window)
    tokens = None if document_ids is None else segments
    seq = positions.shape[1]
    made = BlockMask.from_kv_blocks(
        *_ordered(some & ~full), *_ordered(full), BLOCK, _rule(tokens, window, chunk), (seq, seq)
    )
    return Blocks(made)


def _segments(positions: Tensor, document_ids: Tensor | None, chunk: int | None) -> Tensor:
    """Number of the run of tokens, a document's or a chunk's, within which each token sees others; counted from 0 in
    each row. # int32 (rows or 1, seq)"""
    if document_ids is None:
        at = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32)[None]
        return at // chunk if chunk is not None else torch.zeros_like(at)
    ends = document_ids[:, 1:] != document_ids[:, :-1]
    if chunk is not None:
        ends = ends | (positions[:, 1:] // chunk != positions[:, :-1] // chunk)
    return F.pad(ends.cumsum(1, dtype=torch.int32), (1, 0))


def _touched(segments: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """In which blocks some query sees some key, and in which all see all. # bool (rows or 1, 1, blocks, blocks)"""
    seq = segments.shape[1]
    first = torch.arange(0, seq, BLOCK, device=segments.device)
    last = (first + BLOCK - 1).clamp(max=seq - 1)
    query, key = first[:, None], first[None, :]
    apart = query > key  # else a block is on the diagonal, or above it
    some = apart & (segments[:, first, None] == segments[:, None, last])
    full = apart & (segments[:, last, None] == segments[:, None, first])
    full = full & (query + BLOCK <= seq)  # as of a whole block is asked
    if window is not None:
        some = some & (query - last < window)
        full = full & (last[:, None] - key < window)
    return (some | (query == key))[:, None], full[:, None]


def _ordered(touched: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries meets, and all blocks of keys, these first. # int32"""
    order = touched.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return touched.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _rule(segments: Tensor | None, window: int | None, chunk: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key, by their places in a row."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if segments is not None:
            seen = seen & (segments[row, query] == segments[row, key])
        elif chunk is not None:
            seen = seen & (query // chunk == key // chunk)
        return seen if window is None else seen & (query - key < window)

    return sees


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """See `InnerAttention.forward`. Compiled by itself where the block around it is not."""
    return _attend(q, k, v, mask, scale) if torch.compiler.is_compiling() else _compiled()(q, k, v, mask, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out if isinstance(out, Tensor) else out[0]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    known = WRAPPED in torch._inductor.list_options()
    options: dict[str, Callable[..., object] | bool | int | str] = {WRAPPED: True} if known else {}
    return torch.compile(_attend, fullgraph=True, options=options)


def usable(positions: Tensor) -> bool:
    """Whether masks of these tokens can be block masks: on CUDA, where flex attention works, and at least a block of
    them; not under modes that put subclasses in place of tensors. # (rows, seq)"""
    plain = type(positions) is Tensor and positions.device.type == "cuda"
    return plain and positions.shape[1] >= BLOCK and works(positions.device)


@functools.cache
def works(device: torch.device) -> bool:
    """Try flex attention on a device, forward and backward, against `scaled_dot_product_attention`; say so where it
    does not work. Takes the seconds of a compilation, once a process."""
    try:
        error = _trial(device)
    except Exception as exception:  # whatever compiler, driver or kernel may say: the job goes on without
        error = f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
    if error:
        logger.warning(
            f"attention masks: flex attention does not work on {device} ({error}): masks are bool, seq² bytes a row"
        )
    return not error


@torch.enable_grad()
def _trial(device: torch.device) -> str:
    """What is wrong; empty: nothing. It draws no random numbers: those are the job's."""
    seq, window = 2 * BLOCK, BLOCK + 1
    inputs = [
        torch.arange(heads * seq * LEAST_WIDTH, device=device)
        .reshape(1, heads, seq, LEAST_WIDTH)
        .sin()
        .requires_grad_()
        for heads in (2, 1, 1)
    ]
    places = torch.arange(seq, device=device)
    ids = (places >= BLOCK - 1).long()[None]
    mask = blocks(places[None], ids, window, None).mask
    distance = places[:, None] - places
    allowed = (ids[0, :, None] == ids) & (distance >= 0) & (distance < window)
    found = torch.compile(lambda q, k, v: _attend(q, k, v, mask, None), fullgraph=True)(*inputs)
    q, k, v = inputs
    wide = (x.expand(-1, 2, -1, -1) for x in (k, v))
    want = F.scaled_dot_product_attention(q, *wide, attn_mask=allowed)
    pairs = [(found, want), *zip(*(torch.autograd.grad(x.sin().sum(), inputs) for x in (found, want)), strict=True)]
    worst = max((a - b).abs().max().item() for a, b in pairs)
    return "" if worst < 1e-2 else f"it is wrong by {worst:.1e}"
