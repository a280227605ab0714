"""The shapes of the Mistral family. Torch-free, so that `check` and the dry run's arithmetic start at once.

7B, Nemo, and Small 3, which from 3.1 on stands in files beside a vision tower, which is left out. Only the first 7B has
a window; later ones see all of their document.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.layers.shapes import Reach
from models.decoder.args import BlockShape, DecoderArgs


@dataclass(frozen=True, kw_only=True)
class MistralArgs(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention, over a window where it has one, and
    SwiGLU; no biases."""

    n_heads: int = 32
    n_kv_heads: int = 8
    ffn_hidden: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_seq_len: int = 32768
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""

    def block(self, layer: int) -> BlockShape:
        """All alike."""
        plain = super().block(layer)
        return replace(plain, attention=replace(plain.attention, reach=Reach(self.sliding_window)))


_7B = MistralArgs(dim=4096, n_layers=32, vocab_size=32768)
_12B = MistralArgs(dim=5120, n_layers=40, head_dim=128, vocab_size=131072, max_seq_len=131072)

FLAVORS: Mapping[str, MistralArgs] = MappingProxyType(
    {
        "debugmodel": MistralArgs(
            dim=256, n_layers=6, n_heads=8, n_kv_heads=2, ffn_hidden=768, vocab_size=2048, sliding_window=48
        ),
        "7B-v0.1": replace(_7B, vocab_size=32000, rope_theta=1e4, sliding_window=4096),
        "7B-v0.3": _7B,
        "Nemo": _12B,
        "Small": replace(_12B, ffn_hidden=32768, rope_theta=1e8, max_seq_len=32768),
        "Small-3.1": replace(_12B, ffn_hidden=32768, rope_theta=1e9),
    }
)
