"""Mistral's flavors and its config.json; what it computes, `tests/models/test_parity.py` says."""

from typing import Any

import pytest

from components.layers.shapes import Reach
from models.mistral.args import FLAVORS
from models.mistral.hf import ADAPTER

PUBLISHED = {
    "7B-v0.1": 7_241_732_096,
    "7B-v0.3": 7_248_023_552,
    "Nemo": 12_247_782_400,
    "Small": 23_572_403_200,
    "Small-3.1": 23_572_403_200,
}
V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""As published."""
V0_3 = {**V0_1, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}
NEMO = {**V0_3, "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072}
SMALL = {**NEMO, "intermediate_size": 32768, "rope_theta": 1e8}
SMALL_3_1 = {"model_type": "mistral3", "text_config": {**SMALL, "rope_theta": 1e9}, "vision_config": {"hidden_size": 1}}
FILES = {"7B-v0.1": V0_1, "7B-v0.3": V0_3, "Nemo": NEMO, "Small": SMALL, "Small-3.1": SMALL_3_1}


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, count: int) -> None:
    assert FLAVORS[flavor].parameter_count() == count


def test_a_window_is_that_of_every_block() -> None:
    reaches = {flavor: {block.attention.reach for block in args.blocks} for flavor, args in FLAVORS.items()}
    windows = {"debugmodel": 48, "7B-v0.1": 4096}
    assert reaches == {flavor: {Reach(windows.get(flavor))} for flavor in FLAVORS}


def test_flops_count_the_window_alone() -> None:
    first, third = FLAVORS["7B-v0.1"], FLAVORS["7B-v0.3"]
    matrices = 32 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 14336)
    assert third.flops_per_token(8192) == 6 * (matrices + 32768 * 4096) + 6 * 32 * 2 * 4096 * 4096
    keys = 4096 - 4096**2 / (2 * 8192)  # half a window in the first half of the row, a whole one after it
    assert first.flops_per_token(8192) == 6 * (matrices + 32000 * 4096) + 6 * 32 * 2 * 4096 * keys


@pytest.mark.parametrize("flavor", FILES)
def test_published_files_are_of_one_flavor(flavor: str) -> None:
    found = [name for name, args in FLAVORS.items() if not ADAPTER.config_problems(FILES[flavor], args)]
    assert found == [flavor]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_written_config_is_its_own(flavor: str) -> None:
    found = [name for name, args in FLAVORS.items() if not ADAPTER.config_problems(ADAPTER.to_config(args), args)]
    assert flavor in found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sliding_window": None}, "sliding_window = null, this model has 4096"),
        ({"sliding_window": 1024}, "sliding_window = 1024, this model has 4096"),
        ({"model_type": "llama"}, 'model_type = "llama", this model has "mistral"'),
        ({"layer_types": ["full_attention", "x"]}, 'layer_types = ["full_attention", "x"], this model has null'),
    ],
)
def test_another_model_is_told(change: dict[str, Any], problem: str) -> None:
    assert ADAPTER.config_problems({**V0_1, **change}, FLAVORS["7B-v0.1"]) == [problem]


def test_a_file_without_a_window_has_one() -> None:
    """As transformers takes it."""
    silent = {key: value for key, value in V0_3.items() if key != "sliding_window"}
    assert ADAPTER.config_problems(silent, FLAVORS["7B-v0.3"]) == ["sliding_window = 4096, this model has null"]
