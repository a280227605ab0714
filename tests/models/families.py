"""Every family at odd small shapes: what `test_parity.py` holds against transformers.

A family's `draw` gives another shape for each state of the generator it gets; sizes are small, odd where they may be,
and cover what the family's flavors differ in. `CASES` are shapes that must be among those tried.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from components.layers.shapes import ExpertsShape, Llama3Scaling
from models.decoder.args import DecoderArgs
from models.llama3.args import Llama3Args
from models.qwen3.args import Qwen3Args

Draw = Callable[[random.Random], DecoderArgs]


@dataclass(frozen=True)
class Tried:
    """What is tried of a family."""

    draw: Draw
    """A random shape."""
    cases: Mapping[str, DecoderArgs] = field(default_factory=dict)
    """Shapes by name."""
    attention: str = "sdpa"
    """transformers' implementation of attention to compare with."""


def heads(rng: random.Random) -> dict[str, int]:
    """Query heads, and key-value heads from one to all."""
    n_heads = rng.choice([2, 4, 6])
    return {"n_heads": n_heads, "n_kv_heads": rng.choice([n for n in range(1, n_heads + 1) if n_heads % n == 0])}


def small(rng: random.Random) -> dict[str, int]:
    """Sizes that all families have."""
    return {"n_layers": 2, "vocab_size": rng.choice([61, 64]), "max_seq_len": 256, **heads(rng)}


def llama3(rng: random.Random) -> DecoderArgs:
    scaling = rng.choice([None, Llama3Scaling(8.0, original_max_position=16), Llama3Scaling(32.0, 2.0, 3.0, 24)])
    sizes = small(rng)
    dim = sizes["n_heads"] * rng.choice([4, 6])
    tied, theta = rng.random() < 0.5, rng.choice([1e4, 5e5])
    return Llama3Args(
        dim=dim, ffn_hidden=rng.choice([37, 40]), rope_scaling=scaling, rope_theta=theta, tied_embeddings=tied, **sizes
    )


def qwen3(rng: random.Random) -> DecoderArgs:
    dense = Qwen3Args(
        dim=rng.choice([24, 30]),
        head_dim=rng.choice([6, 10]),
        ffn_hidden=37,
        tied_embeddings=rng.random() < 0.5,
        rope_theta=1e4,
        **small(rng),
    )
    if rng.random() < 0.4:
        return dense
    experts = ExpertsShape(rng.choice([3, 5]), rng.choice([1, 2, 3]), 12, normalize=rng.random() < 0.7)
    return Qwen3Args(**{**vars(dense), "ffn_hidden": 0, "experts": experts})


FAMILIES: dict[str, Tried] = {
    "llama3": Tried(llama3),
    "qwen3": Tried(qwen3),
}
