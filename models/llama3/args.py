"""The shapes of the Llama 3 family. Torch-free, so that `check` and the dry run's arithmetic start at once.

Every number is written out. Meta's own files give the feed-forward width through `multiple_of` and
`ffn_dim_multiplier`; that spares one number per flavor and costs the reader a calculation with three roundings, so it
was rejected. A size alone names the release that brought it, 8B and 70B that of 3.1; what came before or after has its
release in its name. 3.3 is 3.1's 70B with other weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.layers.shapes import Llama3Scaling
from models.decoder.args import DecoderArgs


@dataclass(frozen=True, kw_only=True)
class Llama3Args(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention and SwiGLU, no biases."""

    vocab_size: int = 128256
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_seq_len: int = 131072


_8B = Llama3Args(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_hidden=14336, max_seq_len=8192)
_70B = Llama3Args(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_hidden=28672, max_seq_len=8192)
_OF_3_1 = {"rope_scaling": Llama3Scaling(factor=8.0), "max_seq_len": 131072}
_OF_3_2 = {"rope_scaling": Llama3Scaling(factor=32.0), "tied_embeddings": True}

_70B_OF_3_1 = replace(_70B, **_OF_3_1)

FLAVORS: Mapping[str, Llama3Args] = MappingProxyType(
    {
        "debugmodel": Llama3Args(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_hidden=768, vocab_size=2048),
        "3-8B": _8B,
        "3-70B": _70B,
        "1B": Llama3Args(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_hidden=8192, **_OF_3_2),
        "3B": Llama3Args(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_hidden=8192, **_OF_3_2),
        "8B": replace(_8B, **_OF_3_1),
        "70B": _70B_OF_3_1,
        "3.3-70B": _70B_OF_3_1,
        "405B": Llama3Args(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_hidden=53248, **_OF_3_1),
    }
)
