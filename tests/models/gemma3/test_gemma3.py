"""Gemma 3's flavors, its forms of config.json, and how it starts; what it computes, `tests/models/test_parity.py`
says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.layers.initialize import Normal, initialize
from components.layers.shapes import LinearScaling, Reach, Rope
from models.decoder.model import Decoder
from models.gemma3.args import FLAVORS, Gemma3Args
from models.gemma3.hf import ADAPTER

VISION = 416_866_032
PUBLISHED = {  # vision tower and its projection to the text model's width and their norm, where there are any
    "270M": 268_098_176,
    "1B": 999_885_952,
    "4B": 4_300_079_472 - VISION - 1152 * (2560 + 1),
    "12B": 12_187_325_040 - VISION - 1152 * (3840 + 1),
    "27B": 27_432_406_640 - VISION - 1152 * (5376 + 1),
}
OF_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
"""As published."""
_TEXT = {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def _multimodal(**text: Any) -> dict[str, Any]:
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256}
    return {**whole, "text_config": {**_TEXT, **text}, "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27}}


FILES = {
    "1B": OF_1B,
    "4B": _multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "12B": _multimodal(
        hidden_size=3840,
        intermediate_size=15360,
        num_attention_heads=16,
        num_hidden_layers=48,
        num_key_value_heads=8,
    ),
    "27B": _multimodal(
        head_dim=128,
        hidden_size=5376,
        intermediate_size=21504,
        num_attention_heads=32,
        num_hidden_layers=62,
        num_key_value_heads=16,
        query_pre_attn_scalar=168,
    ),
}
"""As published, with what they leave to transformers."""


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, count: int) -> None:
    assert FLAVORS[flavor].parameter_count() == count


def test_every_sixth_block_is_global() -> None:
    kinds = [(block.attention.reach, block.attention.rope) for block in FLAVORS["4B"].blocks]
    local, everywhere = (Reach(window=1024), Rope(1e4)), (Reach(), Rope(1e6, LinearScaling(8.0)))
    assert kinds == [*([*[local] * 5, everywhere] * 5), *[local] * 4]
    assert {block.attention.rope for block in FLAVORS["1B"].blocks} == {Rope(1e4), Rope(1e6)}


def test_flops_count_the_window_alone() -> None:
    args = FLAVORS["debugmodel"]
    matrices = 6 * (2 * 256 * (4 + 2) * 48 + 3 * 256 * 768) + 2048 * 256
    keys = 5 * (48 - 48**2 / (2 * 256)) + 128
    assert args.flops_per_token(256) == 6 * matrices + 6 * 2 * 4 * 48 * keys


@pytest.mark.parametrize("flavor", FILES)
def test_published_files_are_of_one_flavor(flavor: str) -> None:
    found = [name for name, args in FLAVORS.items() if not ADAPTER.config_problems(FILES[flavor], args)]
    assert found == [flavor]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_what_transformers_makes_of_our_config_is_its_own(flavor: str, tmp_path: Path) -> None:
    """It is read as it was meant, and the form that transformers 5 writes is read."""
    from transformers import Gemma3TextConfig

    (tmp_path / "config.json").write_bytes(ADAPTER.config_bytes(FLAVORS[flavor], "bfloat16"))
    config = Gemma3TextConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "newer")
    newer = json.loads((tmp_path / "newer/config.json").read_text())
    assert {*newer["rope_parameters"]} == {"full_attention", "sliding_attention"}
    assert "rope_theta" not in newer
    found = [name for name, args in FLAVORS.items() if not ADAPTER.config_problems(newer, args)]
    assert found == [flavor]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sliding_window": 1024}, "sliding_window = 1024, this model has 512"),
        ({"rope_local_base_freq": 20000}, "rope_local_base_freq = 20000, this model has 10000.0"),
        ({"query_pre_attn_scalar": 168}, "query_pre_attn_scalar = 168, this model has 256"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0, this model has null"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true, this model has false"),
        ({"hidden_activation": "silu"}, 'hidden_activation = "silu", this model has "gelu_pytorch_tanh"'),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta = 3.0, this model has 1000000.0"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}},
            'rope_local_scaling = {"factor": 2.0, "rope_type": "linear"}, this model has null',
        ),
    ],
)
def test_another_model_is_told(change: dict[str, Any], problem: str) -> None:
    assert ADAPTER.config_problems({**OF_1B, **change}, FLAVORS["1B"]) == [problem]


def test_another_pattern_is_told() -> None:
    (problem,) = ADAPTER.config_problems({**OF_1B, "sliding_window_pattern": 2}, FLAVORS["1B"])
    assert problem.startswith('layer_types = ["sliding_attention", "full_attention", "sliding_attention", ')


@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_with_variances_of_one(tied: bool) -> None:
    """Embedded tokens and logits; between them each block adds its two outputs, normed."""
    args = replace(FLAVORS["debugmodel"], tied_embeddings=tied, n_layers=2)
    assert isinstance(args, Gemma3Args)
    model = Decoder(args)
    initialize(model, model.inits(), 0)
    assert set(model.inits()) >= {name for name, _ in model.named_parameters()}
    tokens = torch.randint(0, args.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    stream: list[float] = []
    for block in model.layers.values():
        block.register_forward_hook(lambda _, given, out: stream.append(out[0].var().item()))
    with torch.no_grad():
        assert model.embed(tokens).var().item() == pytest.approx(1.0, rel=0.05)
        logits = model.output(model(tokens, torch.arange(64).expand(2, 64)))
    assert logits.var().item() == pytest.approx(1.0, rel=0.15)
    assert stream == pytest.approx([3.0, 5.0], rel=0.15)


def test_what_is_normed_needs_no_small_matrices() -> None:
    inits = Decoder(replace(FLAVORS["debugmodel"], n_layers=2)).inits()
    matrices = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("attention.wo", "feed_forward.w2")]
    assert {inits[name] for name in matrices} == {Normal(0.02)}
