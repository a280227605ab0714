"""Attention as transformers' models are asked to compute it here, through the package's own extension points.

Their models hand queries, keys and values to a registered function, and ask another for the mask of each kind of layer.
So windows, chunks, soft caps and sinks stay theirs to say, while documents are kept apart the same way in every model,
and a mask covers the whole row also where a rank holds a piece of it. Their own detection of packed rows was rejected:
it looks at values, which halts the device at every step and cannot be done without values, and sees pieces as rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.runtime.errors import ConfigError

NAME = "espalier"
"""What it is registered as."""
ROWS = "espalier_rows"
"""Attribute of the model's configuration, which is all that reaches `mask`, that holds the `Rows` of a forward pass."""
_READ_ELSEWHERE = frozenset(
    {
        "sliding_window",  # in the mask
        "position_ids",  # in queries and keys
        "position_embeddings",
        "cache_position",
        "layer_idx",
        "use_cache",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)


@dataclass(frozen=True)
class Rows:
    """What a mask is made of."""

    positions: Tensor
    """# (rows, seq)"""
    document_ids: Tensor | None
    """None: attention runs across documents. # (rows, seq)"""


Attend = Callable[..., tuple[Tensor, None]]


def register(name: str = NAME, attend: Attend | None = None) -> str:
    """Make the two functions known to transformers, under a name, which is returned. Raises ConfigError without it."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ConfigError(
            'model.name = "transformers": needs the package transformers, version 5, which cannot be imported'
            f" ({error}): install it"
        ) from error
    AttentionInterface.register(name, attend or attention)
    AttentionMaskInterface.register(name, mask)
    return name


def mask(*, mask_function: Callable[..., Tensor], config: Any, use_vmap: bool = False, **rest: Any) -> Tensor | None:
    """Which keys each query sees: those that `mask_function` allows by positions, of its own document.

    None for plain causal rows. # (rows, 1, seq, seq)
    """
    from transformers.masking_utils import causal_mask_function

    rows: Rows = getattr(config, ROWS)
    if use_vmap:
        raise ConfigError("model.flavor: this model adds a mask of its own, which is not made of positions alone")
    if rows.document_ids is None and mask_function is causal_mask_function:
        return None
    of_queries, of_keys = rows.positions[:, None, :, None], rows.positions[:, None, None, :]
    row = torch.arange(len(rows.positions), device=rows.positions.device)[:, None, None, None]
    allowed = mask_function(row, torch.zeros_like(row), of_queries, of_keys)
    if rows.document_ids is not None:
        allowed = allowed & (rows.document_ids[:, None, :, None] == rows.document_ids[:, None, None, :])
    return allowed


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """One layer's attention. # (rows, heads, seq, head_dim) and keys of fewer heads → (rows, seq, heads, head_dim)

    `softcap`: scores are bent to stay within ± this (Gemma 2). `s_aux`: a further score for each head, whose weight
    goes nowhere (GPT-OSS). Raises ConfigError for what else a model asks for.
    """
    if unknown := sorted(name for name, said in more.items() if said is not None and name not in _READ_ELSEWHERE):
        raise ConfigError(
            f"model.flavor: {type(module).__name__} asks for {', '.join(unknown)}, which is not known here"
        )
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None and s_aux is None:
        causal, drop = attention_mask is None, dropout
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, drop, causal, scale=scaling)
    else:
        out = _bent(query, key, value, attention_mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _bent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention whose scores no fused kernel knows."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")).float()
    if sinks is not None:
        further = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, further), -1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value
