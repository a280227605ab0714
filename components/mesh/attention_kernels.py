"""One tile of attention, forward and backward, by whatever kernel the device has for it.

`scaled_dot_product_attention` does not give the log of the sum of exponentials (lse) that merging needs, so the fused
kernels below it are called by their operators' names: on the CPU flash attention, with masks; on CUDA flash attention
in half precision, without. Everything else is computed in plain operations, in fp32: right everywhere, but it holds
queries × keys numbers for each head, four bytes each and several at once in backward. Those kernels' operators are not
public; `plain_forward` is the reference for them in the tests. The CUDA branch follows their signatures and has not run
on a device yet.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over these keys alone, and the lse of its scores; both in fp32 (fp64 for fp64).

    Args:
        q: # (rows, heads, queries, head_dim)
        k: `heads` is a multiple of their heads. # (rows, kv_heads, keys, head_dim)
        v: # (rows, kv_heads, keys, value_dim)
        mask: Bool, True where allowed. # (rows or 1, 1, queries, keys)
        causal: Query i sees keys up to i; without a mask only.
        scale: What scores are multiplied with; None: 1 / √head_dim.

    Returns:
        Output, 0 for a query that sees no key # (rows, heads, queries, value_dim), and lse, then −∞.
        # (rows, heads, queries)
    """
    k, v = for_all_heads(q, k), for_all_heads(q, v)
    if _on_cpu(q, v):
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_bias(q, mask), scale=scale
        )
        if mask is not None:  # for a query without a key the kernel says 0
            lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    elif _on_cuda(q, v, mask):
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        return plain_forward(q, k, v, mask, causal, scale)
    return out.to(lse.dtype), lse


def tile_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This tile's share of the gradients of q, k, v, in fp32 (fp64 for fp64).

    `grad`, `out` and `lse` are those of the queries' whole attention, over all tiles; the rest is as in `tile_forward`.
    """
    kv_heads, dtype = k.shape[1], lse.dtype
    k, v = for_all_heads(q, k), for_all_heads(q, v)
    if _on_cpu(q, v):
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_bias(q, mask), scale=scale
        )
    elif _on_cuda(q, v, mask):
        lengths, seed = (q.shape[2], k.shape[2]), q.new_empty(2, dtype=torch.uint64)  # the seed is dropout's: unused
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, seed, seed, scale=scale
        )
    else:
        dq, dk, dv = plain_backward(grad, q, out, lse, k, v, mask, causal, scale)
    return dq.to(dtype), _by_kv_head(dk.to(dtype), kv_heads), _by_kv_head(dv.to(dtype), kv_heads)


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`tile_forward` in plain operations, for as many key as query heads."""
    scores = _scores(q, k, mask, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().nan_to_num() @ v.to(scores.dtype), lse


def plain_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_backward` in plain operations, for as many key as query heads."""
    probabilities = (_scores(q, k, mask, causal, scale) - lse[..., None]).exp()
    grad, out, q, k, v = (x.to(lse.dtype) for x in (grad, out, q, k, v))
    inner = grad @ v.mT - (grad * out).sum(-1, keepdim=True)
    d_scores = probabilities * inner * _factor(q, scale)
    return d_scores @ k, d_scores.mT @ q, probabilities.mT @ grad


def _factor(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * _factor(q, scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _on_cpu(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _on_cuda(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    width = q.shape[-1]
    fits = width == v.shape[-1] and width % 8 == 0 and width <= 256
    return q.device.type == "cuda" and q.dtype in HALF and fits and mask is None


def _bias(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """What is added to the scores, which is how the kernel wants a mask."""
    return None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


def for_all_heads(q: Tensor, k: Tensor) -> Tensor:
    """Each key head as often as queries share it: the kernels would read beyond the end."""
    return k if q.shape[1] == k.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _by_kv_head(gradient: Tensor, kv_heads: int) -> Tensor:
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(2)
