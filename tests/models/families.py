"""Every family at odd small shapes: what `test_parity.py` holds against transformers.

A family's `draw` gives another shape for each state of the generator it gets; sizes are small, odd where they may be,
and cover what the family's flavors differ in. `CASES` are shapes that must be among those tried.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components.layers.shapes import ExpertsShape, LinearScaling, Llama3Scaling, Temperature, YarnScaling
from models.decoder.args import DecoderArgs
from models.deepseek_v3.args import DeepseekV3Args
from models.gemma3.args import Gemma3Args
from models.gpt_oss.args import GptOssArgs
from models.gpt_oss.args import experts as gpt_oss_experts
from models.llama3.args import Llama3Args
from models.llama4.args import Llama4Args
from models.llama4.args import experts as llama4_experts
from models.mistral.args import MistralArgs
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


def heads(rng: random.Random) -> dict[str, Any]:
    """Query heads, and key-value heads from one to all."""
    n_heads = rng.choice([2, 4, 6])
    return {"n_heads": n_heads, "n_kv_heads": rng.choice([n for n in range(1, n_heads + 1) if n_heads % n == 0])}


def small(rng: random.Random) -> dict[str, Any]:
    """Sizes that all families have."""
    return {"n_layers": 2, "vocab_size": rng.choice([61, 64]), "max_seq_len": 256, **heads(rng)}


def llama3(rng: random.Random) -> DecoderArgs:
    scaling = rng.choice([None, Llama3Scaling(8.0, original_max_position=16), Llama3Scaling(32.0, 2.0, 3.0, 24)])
    sizes = small(rng)
    dim = sizes["n_heads"] * rng.choice([4, 6])
    tied, theta = rng.random() < 0.5, rng.choice([1e4, 5e5])
    return Llama3Args(
        dim=dim,
        ffn_hidden=rng.choice([37, 40]),
        rope_scaling=scaling,
        rope_theta=theta,
        tied_embeddings=tied,
        head_dim=rng.choice([0, 10]),
        **sizes,
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
    return replace(dense, ffn_hidden=0, experts=experts)


def window(rng: random.Random) -> int:
    """Shorter than all rows and most documents, than some, or longer than all. (Not 1: queries and keys have no
    gradients then but rounding.)"""
    return rng.choice([2, 3, 7, 12, 19, 64])


def mistral(rng: random.Random) -> DecoderArgs:
    sizes = small(rng)
    return MistralArgs(
        dim=sizes["n_heads"] * rng.choice([4, 6]),
        head_dim=rng.choice([0, 10]),
        ffn_hidden=37,
        rope_theta=rng.choice([1e4, 1e6]),
        sliding_window=rng.choice([None, window(rng)]),
        tied_embeddings=rng.random() < 0.3,
        **sizes,
    )


def gemma3(rng: random.Random) -> DecoderArgs:
    sizes: dict[str, Any] = {**small(rng), "n_layers": 3}
    return Gemma3Args(
        dim=sizes["n_heads"] * rng.choice([4, 6]),
        head_dim=rng.choice([6, 10]),
        ffn_hidden=37,
        rope_theta=rng.choice([1e4, 1e6]),
        rope_scaling=rng.choice([None, LinearScaling(8.0), LinearScaling(2.5)]),
        local_theta=rng.choice([1e3, 1e4]),
        sliding_window=window(rng),
        pattern=rng.choice([1, 2, 3]),
        query_pre_attn_scalar=rng.choice([5, 24]),
        tied_embeddings=rng.random() < 0.7,
        **sizes,
    )


MISTRAL = MistralArgs(
    dim=24, n_layers=2, n_heads=4, head_dim=10, n_kv_heads=2, ffn_hidden=37, vocab_size=61, sliding_window=7
)
GEMMA3 = Gemma3Args(
    dim=24,
    n_layers=4,
    n_heads=4,
    n_kv_heads=1,
    head_dim=10,
    ffn_hidden=37,
    vocab_size=61,
    rope_scaling=LinearScaling(8.0),
    sliding_window=7,
    pattern=2,
    query_pre_attn_scalar=6,
)


def gpt_oss(rng: random.Random) -> DecoderArgs:
    scaling = YarnScaling(
        rng.choice([4.0, 32.0]), rng.choice([16, 64]), rng.choice([4.0, 32.0]), truncate=rng.random() < 0.5
    )
    return GptOssArgs(
        dim=rng.choice([24, 30]),
        head_dim=rng.choice([6, 10]),
        experts=gpt_oss_experts(rng.choice([3, 5]), rng.choice([1, 2, 3]), rng.choice([12, 13])),
        window=rng.choice([2, 5, 16, 64]),
        rope_scaling=scaling,
        **small(rng),
    )


def llama4(rng: random.Random) -> DecoderArgs:
    narrow = Llama3Scaling(16.0, 1.0, 1.0, 16)
    return Llama4Args(
        dim=rng.choice([24, 30]),
        head_dim=rng.choice([6, 10]),
        ffn_hidden=37,
        experts=replace(llama4_experts(rng.choice([3, 5]), rng.choice([12, 13])), per_token=rng.choice([1, 1, 2])),
        experts_every=rng.choice([1, 2]),
        plain_every=rng.choice([2, 3]),
        chunk=rng.choice([2, 5, 16, 64]),
        qk_norm=rng.random() < 0.6,
        temperature=rng.choice([None, Temperature(3, 0.5), Temperature(8), Temperature(64)]),
        rope_scaling=rng.choice([None, narrow, Llama3Scaling(8.0, original_max_position=16)]),
        tied_embeddings=rng.random() < 0.3,
        **small(rng) | {"n_layers": 3},
    )


def deepseek_v3(rng: random.Random) -> DecoderArgs:
    """V3 and, with a softmax, V2."""
    third, n_heads = rng.random() < 0.6, rng.choice([2, 3, 4])
    yarn = YarnScaling(rng.choice([4.0, 40.0]), 16, beta_fast=rng.choice([1.0, 32.0]))
    groups, hidden = rng.choice([(1, 1), (4, 2), (2, 1)]), rng.choice([9, 12])
    normalize: Any = {"normalize": rng.random() < 0.7} if third else {"normalize": False, "group_score": "max"}
    experts = ExpertsShape(
        8,
        rng.choice([1, 2, 4]),
        hidden,
        score="sigmoid" if third else "softmax",
        selection_bias=third,
        groups=groups[0],
        top_groups=groups[1],
        scale=rng.choice([1.0, 2.5]),
        shared_hidden=hidden * rng.choice([1, 2]),
        **normalize,
    )
    return DeepseekV3Args(
        dim=n_heads * rng.choice([8, 9]),
        n_layers=3,
        n_heads=n_heads,
        ffn_hidden=37,
        vocab_size=61,
        dense_layers=rng.choice([0, 1, 2]),
        q_rank=rng.choice([0, 11]),
        kv_rank=rng.choice([7, 10] if third else [8, 10]),  # transformers' V2 turns even widths alone
        nope_dim=rng.choice([3, 8] if third else [4, 8]),
        rope_dim=rng.choice([2, 6]),
        v_dim=rng.choice([5, 8, 14]),
        rope_scaling=rng.choice([None, yarn, replace(yarn, mscale=0.7, mscale_all_dim=0.7 if third else 1.0)]),
        max_seq_len=256,
        experts=experts,
    )


GPT_OSS = GptOssArgs(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=1,
    head_dim=10,
    vocab_size=61,
    experts=gpt_oss_experts(3, 1, 12),
    window=5,
    rope_scaling=YarnScaling(32.0, 16, truncate=False),
)
LLAMA4 = Llama4Args(
    dim=24,
    n_layers=4,
    n_heads=4,
    n_kv_heads=4,
    head_dim=10,
    ffn_hidden=37,
    vocab_size=61,
    experts=llama4_experts(3, 12),
    experts_every=2,
    chunk=7,
    temperature=Temperature(6, 0.5),
    rope_scaling=Llama3Scaling(16.0, 1.0, 1.0, 16),
    max_seq_len=256,
)


FAMILIES: dict[str, Tried] = {
    "deepseek_v3": Tried(deepseek_v3),
    "gemma3": Tried(gemma3, {"window within a document": GEMMA3, "of half of it": replace(GEMMA3, sliding_window=17)}),
    "llama3": Tried(llama3),
    "mistral": Tried(mistral, {"window within a document": MISTRAL, "beyond": replace(MISTRAL, sliding_window=64)}),
    "qwen3": Tried(qwen3),
    "gpt_oss": Tried(
        gpt_oss,
        {
            "one expert, one key-value head": GPT_OSS,
            "all heads, a window beyond": replace(GPT_OSS, n_kv_heads=4, window=64),
        },
        attention="eager",  # transformers has no other on a CPU that knows sinks
    ),
    "llama4": Tried(llama4, {"chunks within a document": LLAMA4, "beyond": replace(LLAMA4, n_kv_heads=1, chunk=64)}),
}
