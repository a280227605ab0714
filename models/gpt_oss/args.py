"""The shapes of the GPT-OSS family (OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025). Torch-free, so that
`check` and the dry run's arithmetic start at once.

Flavors are called as their publisher and TorchTitan call them: 20b and 120b.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from components.layers.shapes import AttentionShape, ExpertsShape, Reach, Rope, YarnScaling
from models.decoder.args import BlockShape, DecoderArgs

_STRETCHED = YarnScaling(factor=32.0, original_max_position=4096, truncate=False)


@dataclass(frozen=True, kw_only=True)
class GptOssArgs(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention, in every other block over a
    window, with a sink in each head; and a mixture of experts with a clamped gate. All matrices but the embedding and
    the head have biases."""

    experts: ExpertsShape = field()
    """The experts; a flavor must say them."""
    head_dim: int = 64
    vocab_size: int = 201088
    norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_scaling: YarnScaling = _STRETCHED
    max_seq_len: int = 131072
    window: int = 128
    """Tokens that queries of the first, the third, … block see, themselves included; those of the others see all."""

    def block(self, layer: int) -> BlockShape:
        """Windows and whole rows take turns."""
        rope = Rope(self.rope_theta, self.rope_scaling)
        reach = Reach(window=self.window) if layer % 2 == 0 else Reach()
        heads = (self.n_heads, self.n_kv_heads, self.head_width)
        return BlockShape(AttentionShape(*heads, rope, reach, bias=True, out_bias=True, sinks=True), self.experts)


def experts(count: int, per_token: int = 4, hidden: int = 2880) -> ExpertsShape:
    """The family's experts."""
    return ExpertsShape(count, per_token, hidden, router_bias=True, bias=True, activation="clamped_swiglu")


FLAVORS: Mapping[str, GptOssArgs] = MappingProxyType(
    {
        "debugmodel": GptOssArgs(
            dim=256, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=2048, window=48, experts=experts(8, 2, 192)
        ),
        "20b": GptOssArgs(dim=2880, n_layers=24, n_heads=64, n_kv_heads=8, experts=experts(32)),
        "120b": GptOssArgs(dim=2880, n_layers=36, n_heads=64, n_kv_heads=8, experts=experts(128)),
    }
)
