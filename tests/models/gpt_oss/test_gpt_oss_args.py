"""Shapes and counts of the GPT-OSS flavors, and what they are called in config.json."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.parallelism import Parallelism
from components.layers.shapes import Reach
from models.gpt_oss.args import FLAVORS
from models.gpt_oss.hf import ADAPTER

PUBLISHED = {"20b": (20.91e9, 3.61e9), "120b": (116.83e9, 5.13e9)}
"""Table 1 of the model card: all parameters but biases of few, and those that a token meets with the head's."""


def test_parameter_counts_written_out() -> None:
    """Attention, its biases and sinks; router; experts with biases; norms."""
    attention = 2880 * 64 * (64 + 8 + 8 + 64) + 64 * (64 + 8 + 8) + 2880 + 64
    expert = 3 * 2880 * 2880 + 3 * 2880
    for flavor, layers, experts in (("20b", 24, 32), ("120b", 36, 128)):
        block = attention + experts * (2880 + 1) + experts * expert + 2 * 2880
        assert FLAVORS[flavor].parameter_count() == layers * block + 2 * 201088 * 2880 + 2880
    assert FLAVORS["20b"].parameter_count() == 20_914_757_184
    assert FLAVORS["120b"].parameter_count() == 116_829_156_672


@pytest.mark.parametrize(("flavor", "counts"), PUBLISHED.items())
def test_counts_are_the_published_ones(flavor: str, counts: tuple[float, float]) -> None:
    args = FLAVORS[flavor]
    assert args.parameter_count() == pytest.approx(counts[0], rel=5e-4)
    assert args.flops_per_token(0) / 6 == pytest.approx(counts[1], rel=2e-3)


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


def test_windows_and_whole_rows_take_turns() -> None:
    reaches = [block.attention.reach for block in FLAVORS["20b"].blocks]
    assert reaches == [Reach(window=128), Reach()] * 12
    assert ADAPTER.to_config(FLAVORS["20b"])["layer_types"] == ["sliding_attention", "full_attention"] * 12
    half = FLAVORS["20b"].flops_per_token(8192) - FLAVORS["20b"].flops_per_token(0)
    assert half == 6 * 12 * 2 * 64 * 64 * (4096 + 127)  # half of the row, and 128 keys but for the first 128 queries


def test_config_is_the_published_one() -> None:
    """What the published config.json says of the shape; `quantization_config` is of the weights."""
    config = ADAPTER.to_config(FLAVORS["20b"])
    said = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    assert {key: config[key] for key in said} == said
    assert "quantization_config" not in config


def test_another_config_is_refused() -> None:
    config = ADAPTER.to_config(FLAVORS["20b"])
    changed = {**config, "num_local_experts": 128, "sliding_window": 64, "swiglu_limit": 5.0, "swiglu_alpha": 1.5}
    assert ADAPTER.config_problems({**changed, "layer_types": None}, FLAVORS["20b"]) == [
        "num_experts = 128, this model has 32",
        "sliding_window = 64, this model has 128",
        "swiglu_alpha = 1.5, this model has 1.702",
        "swiglu_limit = 5.0, this model has 7.0",
    ]
    assert ADAPTER.config_problems({"model_type": "gpt_oss"}, FLAVORS["20b"]) == [
        "num_experts = 128, this model has 32",
        "num_hidden_layers = 36, this model has 24",
    ]


def test_biases_of_experts_must_be_dealt_evenly_too() -> None:
    args = replace(FLAVORS["debugmodel"], dim=250)
    job = JobConfig(parallelism=Parallelism(tensor_parallel_degree=4, expert_tensor_parallel_degree=4))
    assert [line for line in args.problems(job) if "expert" in line] == [
        "parallelism.expert_tensor_parallel_degree = 4: 250 bias elements of each expert cannot be dealt evenly to 4"
        " ranks; take a divisor of 250"
    ]
