"""The shapes of the Qwen3 family. Torch-free, so that `check` and the dry run's arithmetic start at once.

Dense flavors and mixture-of-experts flavors are one dataclass: they differ in the feed-forward part of a block alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.layers.shapes import AttentionShape, ExpertsShape, Rope
from models.decoder.args import BlockShape, DecoderArgs


@dataclass(frozen=True, kw_only=True)
class Qwen3Args(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention, whose queries and keys are normed
    in each head, and SwiGLU or a mixture of SwiGLU experts; no biases."""

    head_dim: int = 128
    vocab_size: int = 151936
    rope_theta: float = 1e6
    max_seq_len: int = 40960

    def block(self, layer: int) -> BlockShape:
        """All alike."""
        rope = Rope(self.rope_theta, self.rope_scaling)
        attention = AttentionShape(self.n_heads, self.n_kv_heads, self.head_width, rope, qk_norm="before")
        return replace(super().block(layer), attention=attention)


_SMALL = Qwen3Args(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_hidden=768, head_dim=48, vocab_size=2048)

FLAVORS: Mapping[str, Qwen3Args] = MappingProxyType(
    {
        "debugmodel": _SMALL,
        "debugmodel_moe": replace(_SMALL, ffn_hidden=0, experts=ExpertsShape(count=16, per_token=4, hidden=192)),
        "0.6B": Qwen3Args(dim=1024, n_layers=28, n_heads=16, n_kv_heads=8, ffn_hidden=3072, tied_embeddings=True),
        "1.7B": Qwen3Args(dim=2048, n_layers=28, n_heads=16, n_kv_heads=8, ffn_hidden=6144, tied_embeddings=True),
        "4B": Qwen3Args(dim=2560, n_layers=36, n_heads=32, n_kv_heads=8, ffn_hidden=9728, tied_embeddings=True),
        "8B": Qwen3Args(dim=4096, n_layers=36, n_heads=32, n_kv_heads=8, ffn_hidden=12288),
        "14B": Qwen3Args(dim=5120, n_layers=40, n_heads=40, n_kv_heads=8, ffn_hidden=17408),
        "32B": Qwen3Args(dim=5120, n_layers=64, n_heads=64, n_kv_heads=8, ffn_hidden=25600),
        "30B-A3B": Qwen3Args(
            dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, experts=ExpertsShape(count=128, per_token=8, hidden=768)
        ),
        "235B-A22B": Qwen3Args(
            dim=4096, n_layers=94, n_heads=64, n_kv_heads=4, experts=ExpertsShape(count=128, per_token=8, hidden=1536)
        ),
    }
)
