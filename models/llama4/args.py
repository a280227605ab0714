"""The shapes of the Llama 4 family's language model. Torch-free, so that `check` and the dry run's arithmetic start at
once.

Flavors are called as TorchTitan calls them, after Meta's names: 17bx16e is Scout, 17bx128e is Maverick. Published
models see images besides: what makes tokens of them is no part of this, and is left out when files are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from components.layers.shapes import (
    AttentionShape,
    ExpertsShape,
    FeedForwardShape,
    Llama3Scaling,
    Reach,
    Rope,
    Temperature,
)
from models.decoder.args import BlockShape, DecoderArgs

_TUNED = Temperature(floor=8192, scale=0.1)


@dataclass(frozen=True, kw_only=True)
class Llama4Args(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query attention: most with rotary positions, over chunks
    of the document, the others without positions, over all of it; and SwiGLU or a mixture of SwiGLU experts; no
    biases."""

    experts: ExpertsShape = field()
    """The experts; a flavor must say them."""
    head_dim: int = 128
    vocab_size: int = 202048
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    experts_every: int = 1
    """The last of so many blocks has experts; the others are dense."""
    plain_every: int = 4
    """The last of so many blocks has no positions, and sees all tokens."""
    chunk: int = 8192
    """Tokens of a chunk."""
    qk_norm: bool = True
    """Queries and keys are normed in blocks with positions, once they are turned."""
    temperature: Temperature | None = _TUNED
    """Scaling of queries in blocks without positions; None: none."""

    def has_experts(self, layer: int) -> bool:
        """Whether block number `layer` has experts."""
        return (layer + 1) % self.experts_every == 0

    def has_positions(self, layer: int) -> bool:
        """Whether block number `layer` turns queries and keys by their positions."""
        return (layer + 1) % self.plain_every != 0

    def block(self, layer: int) -> BlockShape:
        """Both kinds of attention with both kinds of what follows."""
        heads = (self.n_heads, self.n_kv_heads, self.head_width)
        if self.has_positions(layer):
            rope = Rope(self.rope_theta, self.rope_scaling, neighbours=True)
            norms = "after" if self.qk_norm else "none"
            attention = AttentionShape(*heads, rope, Reach(chunk=self.chunk), norms)
        else:
            attention = AttentionShape(*heads, None, temperature=self.temperature)
        return BlockShape(attention, self.experts if self.has_experts(layer) else FeedForwardShape(self.ffn_hidden))


def experts(count: int, hidden: int = 8192) -> ExpertsShape:
    """The family's experts: of each token one, weighted by its own score, and one that all share."""
    return ExpertsShape(count, 1, hidden, False, score="sigmoid", scale_input=True, shared_hidden=hidden)


_SCOUT = Llama4Args(
    dim=5120,
    n_layers=48,
    n_heads=40,
    n_kv_heads=8,
    ffn_hidden=16384,
    experts=experts(16),
    rope_scaling=Llama3Scaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    max_seq_len=10485760,
)

FLAVORS: Mapping[str, Llama4Args] = MappingProxyType(
    {
        "debugmodel": Llama4Args(
            dim=256,
            n_layers=6,
            n_heads=8,
            n_kv_heads=4,
            head_dim=32,
            ffn_hidden=768,
            vocab_size=2048,
            experts=experts(8, 384),
            experts_every=2,
            chunk=48,
            temperature=Temperature(floor=16),
            max_seq_len=131072,
        ),
        "17bx16e": _SCOUT,
        "17bx128e": replace(
            _SCOUT, experts=experts(128), experts_every=2, qk_norm=False, rope_scaling=None, max_seq_len=1048576
        ),
    }
)
