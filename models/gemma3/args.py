"""The shapes of the Gemma 3 family's text models. Torch-free, so that `check` and the dry run's arithmetic start at
once.

Blocks come in two kinds: of every `pattern` blocks the last sees all of its document, the others a window, with
rotary frequencies of their own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.layers.shapes import AttentionShape, FeedForwardShape, LinearScaling, NormShape, Reach, Rope
from models.decoder.args import BlockShape, DecoderArgs


@dataclass(frozen=True, kw_only=True)
class Gemma3Args(DecoderArgs):
    """One flavor: a decoder with norms before and after attention and feed-forward, whose weights are counted from 1;
    grouped-query rotary attention with normed queries and keys, GELU gates, scaled embeddings, a tied head; no
    biases."""

    head_dim: int = 256
    vocab_size: int = 262208
    rope_theta: float = 1e6
    tied_embeddings: bool = True
    max_seq_len: int = 131072
    sliding_window: int = 1024
    """Tokens that a query of a local block sees, itself included."""
    local_theta: float = 1e4
    """Base of the rotary frequencies in local blocks, where they are not scaled."""
    pattern: int = 6
    """Every so many blocks one is global, the last of them."""
    query_pre_attn_scalar: int = 256
    """Scores are divided by the square root of this."""

    def is_local(self, layer: int) -> bool:
        """Whether that block sees a window alone."""
        return (layer + 1) % self.pattern != 0

    def block(self, layer: int) -> BlockShape:
        """Local or global."""
        local = self.is_local(layer)
        attention = AttentionShape(
            self.n_heads,
            self.n_kv_heads,
            self.head_width,
            Rope(self.local_theta) if local else Rope(self.rope_theta, self.rope_scaling),
            Reach(self.sliding_window if local else None),
            qk_norm="before",
            scale=self.query_pre_attn_scalar**-0.5,
        )
        return BlockShape(attention, FeedForwardShape(self.ffn_hidden, "gelu_tanh"), sandwich=True)

    @property
    def norms(self) -> NormShape:
        """Gemma's."""
        return NormShape(self.norm_eps, zero_centered=True)

    @property
    def embedding_scale(self) -> float:
        """A tied matrix starts small, as the head; this makes embedded tokens of about variance 1 of it."""
        return math.sqrt(self.dim)


_SHORT = {"vocab_size": 262144, "max_seq_len": 32768, "sliding_window": 512}
_4B = Gemma3Args(dim=2560, n_layers=34, n_heads=8, n_kv_heads=4, ffn_hidden=10240, rope_scaling=LinearScaling(8.0))

FLAVORS: Mapping[str, Gemma3Args] = MappingProxyType(
    {
        "debugmodel": Gemma3Args(
            dim=256,
            n_layers=6,
            n_heads=4,
            n_kv_heads=2,
            head_dim=48,
            ffn_hidden=768,
            vocab_size=2048,
            sliding_window=48,
            query_pre_attn_scalar=64,
        ),
        "270M": Gemma3Args(dim=640, n_layers=18, n_heads=4, n_kv_heads=1, ffn_hidden=2048, **_SHORT),
        "1B": Gemma3Args(dim=1152, n_layers=26, n_heads=4, n_kv_heads=1, ffn_hidden=6912, **_SHORT),
        "4B": _4B,
        "12B": replace(_4B, dim=3840, n_layers=48, n_heads=16, n_kv_heads=8, ffn_hidden=15360),
        "27B": replace(
            _4B,
            dim=5376,
            n_layers=62,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            ffn_hidden=21504,
            query_pre_attn_scalar=168,
        ),
    }
)
