"""The shapes of DeepSeek-V2 and V3, and of Kimi K2, which is V3 in other sizes. Torch-free, so that `check` and the dry
run's arithmetic start at once.

V2 and V3 are one dataclass: what they differ in, the router, is the experts' shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.layers.shapes import ExpertsShape, FeedForwardShape, LatentShape, Rope, YarnScaling
from models.decoder.args import BlockShape, DecoderArgs


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Args(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with latent attention, the first of them with SwiGLU, the others with
    experts, one of which sees every token; no biases."""

    experts: ExpertsShape
    """The experts of all blocks but the first."""
    dense_layers: int = 3
    """So many blocks at the start have no experts."""
    n_kv_heads: int = 0
    """Not used: keys and values of all heads come from one vector."""
    q_rank: int = 1536
    """Width of the vector that queries come from; 0: they come from the input itself."""
    kv_rank: int = 512
    """Width of the vector that keys and values come from."""
    nope_dim: int = 128
    """Width of a head's queries and keys that has no positions."""
    rope_dim: int = 64
    """Width of what is turned."""
    v_dim: int = 128
    """Width of a head's values."""
    max_seq_len: int = 163840

    def block(self, layer: int) -> BlockShape:
        """Dense at the start, then with experts; modules of multi-token prediction go on counting."""
        rope = Rope(self.rope_theta, self.rope_scaling, neighbours=True)
        widths = (self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim)
        dense = layer < self.dense_layers
        return BlockShape(
            LatentShape(self.n_heads, *widths, rope), FeedForwardShape(self.ffn_hidden) if dense else self.experts
        )


_V3 = ExpertsShape(
    count=256,
    per_token=8,
    hidden=2048,
    score="sigmoid",
    groups=8,
    top_groups=4,
    scale=2.5,
    selection_bias=True,
    bias_rate=0.001,
    shared_hidden=2048,
    balance_coefficient=1e-4,
)
_671B = DeepseekV3Args(
    dim=7168,
    n_layers=61,
    n_heads=128,
    ffn_hidden=18432,
    vocab_size=129280,
    experts=_V3,
    rope_scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    mtp_layers=1,
)

FLAVORS: Mapping[str, DeepseekV3Args] = MappingProxyType(
    {
        "debugmodel": DeepseekV3Args(
            dim=256,
            n_layers=4,
            n_heads=8,
            ffn_hidden=768,
            vocab_size=2048,
            dense_layers=1,
            q_rank=96,
            kv_rank=64,
            nope_dim=32,
            rope_dim=16,
            v_dim=32,
            max_seq_len=4096,
            mtp_layers=1,
            experts=replace(_V3, count=16, per_token=4, hidden=96, groups=4, top_groups=2, shared_hidden=96),
        ),
        "16B": DeepseekV3Args(
            dim=2048,
            n_layers=27,
            n_heads=16,
            ffn_hidden=10944,
            vocab_size=102400,
            dense_layers=1,
            q_rank=0,
            experts=ExpertsShape(count=64, per_token=6, hidden=1408, normalize=False, shared_hidden=2 * 1408),
            rope_scaling=YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
        ),
        "671B": _671B,
        "kimi_k2": replace(
            _671B,
            n_heads=64,
            vocab_size=163840,
            dense_layers=1,
            experts=replace(_V3, count=384, groups=1, top_groups=1, scale=2.827),
            rope_theta=50000.0,
            rope_scaling=YarnScaling(32.0, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
            max_seq_len=131072,
            mtp_layers=0,
        ),
    }
)
"""16B is V2-Lite, 671B is V3 and R1."""
