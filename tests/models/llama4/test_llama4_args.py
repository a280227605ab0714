"""Shapes and counts of the Llama 4 flavors, and what they are called in config.json."""

import json
import math
from typing import Any

import pytest
import torch

from components.layers.rotary import inverse_frequencies
from components.layers.shapes import AttentionShape, Reach, Rope, Temperature
from models.llama4.args import FLAVORS
from models.llama4.hf import ADAPTER


def test_parameter_counts_written_out() -> None:
    """Attention; router, experts and the shared one, or a dense feed-forward; norms. About 109 B and 400 B are
    published, with 17 B active, images included."""
    attention, feed_forward = 5120 * 128 * (40 + 8 + 8 + 40) + 2 * 5120, 3 * 5120 * 16384
    expert, ends = 3 * 5120 * 8192, 2 * 202048 * 5120 + 5120
    scout = 48 * (attention + 16 * 5120 + 17 * expert)
    maverick = 24 * (attention + 128 * 5120 + 129 * expert) + 24 * (attention + feed_forward)
    assert FLAVORS["17bx16e"].parameter_count() == scout + ends == 107_769_861_120
    assert FLAVORS["17bx128e"].parameter_count() == maverick + ends == 400_711_848_960
    for flavor in ("17bx16e", "17bx128e"):
        active = FLAVORS[flavor].flops_per_token(0) / 6 + 202048 * 5120
        assert active == pytest.approx(17.2e9, rel=5e-3)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_transformers_counts_the_same(flavor: str, tmp_path: Any) -> None:
    """Of the config.json that we write; and what transformers writes of it is that of the flavor still."""
    from transformers import AutoConfig, AutoModelForCausalLM

    args = FLAVORS[flavor]
    (tmp_path / "config.json").write_bytes(ADAPTER.config_bytes(args, "bfloat16"))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == args.parameter_count()
    config.save_pretrained(tmp_path)
    assert ADAPTER.config_problems(json.loads((tmp_path / "config.json").read_bytes()), args) == []


def test_blocks_of_both_kinds() -> None:
    scout, maverick = FLAVORS["17bx16e"].blocks, FLAVORS["17bx128e"].blocks
    assert [block.experts is not None for block in scout] == [True] * 48
    assert [block.experts is not None for block in maverick] == [False, True] * 24
    for blocks, norms in ((scout, "after"), (maverick, "none")):
        attentions = [block.attention for block in blocks if isinstance(block.attention, AttentionShape)]
        assert [each.rope is not None for each in attentions] == [True, True, True, False] * 12
        assert [each.reach for each in attentions] == [*[Reach(chunk=8192)] * 3, Reach()] * 12
        assert [each.qk_norm for each in attentions] == [*[norms] * 3, "none"] * 12
        assert [each.temperature for each in attentions] == [None, None, None, Temperature(8192, 0.1)] * 12
        assert all(each.rope.neighbours for each in attentions if each.rope)


def test_frequencies_where_nothing_is_in_between() -> None:
    """Scout's limits are the same: what turns once or more over 8192 tokens stays, the rest is divided by 16."""
    args = FLAVORS["17bx16e"]
    plain, scaled = (inverse_frequencies(128, Rope(5e5, scaling)) for scaling in (None, args.rope_scaling))
    turns = 8192 * plain / (2 * math.pi)
    assert 0 < int((turns < 1).sum()) < 64
    assert torch.equal(scaled, torch.where(turns < 1, plain / 16, plain))


def test_published_configs_are_understood() -> None:
    """The first published form: lists that follow from intervals are absent or empty, and true is 4."""
    args = FLAVORS["17bx128e"]
    config = {**ADAPTER.to_config(args), "no_rope_layers": [], "attn_temperature_tuning": 4}
    for key in ("moe_layers", "layer_types", "no_rope_layer_interval", "floor_scale", "attn_scale", "head_dim"):
        del config[key]
    assert ADAPTER.config_problems(config, args) == []
    nested = {"model_type": "llama4", "text_config": config, "vision_config": {}}
    assert ADAPTER.config_problems(nested, args) == []
    assert ADAPTER.config_problems({**nested, "model_type": "gemma3"}, args) == [
        'model_type = "gemma3", this model is in llama4'
    ]
    config |= {"interleave_moe_layer_step": 3, "num_hidden_layers": 6, "no_rope_layer_interval": 2, "use_qk_norm": True}
    assert ADAPTER.config_problems({**config, "attn_temperature_tuning": 0}, FLAVORS["debugmodel"])[0] == (
        "attention_chunk_size = 8192, this model has 48"
    )
    assert [line for line in ADAPTER.config_problems(config, FLAVORS["debugmodel"]) if "layers" in line] == [
        "moe_layers = [2, 5], this model has [1, 3, 5]",
        "no_rope_layers = [1, 0, 1, 0, 1, 0], this model has [1, 1, 1, 0, 1, 1]",
    ]
