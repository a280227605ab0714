"""Shapes and counts of the DeepSeek flavors, and what they are called in config.json."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.model import Model
from components.config.parallelism import Parallelism
from models.decoder.model import Decoder
from models.deepseek_v3.args import FLAVORS
from models.deepseek_v3.hf import ADAPTER

PUBLISHED = {"16B": 15_706_484_224, "671B": 671_026_419_200, "kimi_k2": 1_026_408_232_448}
"""Elements of the published files without multi-token prediction, selection biases included."""
YARN: dict[str, Any] = {"beta_slow": 1, "original_max_position_embeddings": 4096, "type": "yarn"}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "beta_fast": 32, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
FILES: dict[str, dict[str, Any]] = {
    "671B": V3,
    "16B": V3
    | {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rope_scaling": {**YARN, "beta_fast": 32, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "kimi_k2": V3
    | {
        "model_type": "kimi_k2",
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "n_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "rope_scaling": {**YARN, "beta_fast": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    },
}
"""What published files say of the shape."""


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, count: int) -> None:
    args = replace(FLAVORS[flavor], mtp_layers=0)
    biases = args.experts.count * (args.n_layers - args.dense_layers) * args.experts.selection_bias
    assert args.parameter_count() + biases == count


def test_what_a_token_meets_is_what_is_published() -> None:
    """2.4, 37 and 32 billion; with the embedding, which is a look-up, and without multi-token prediction."""
    for flavor, billions in (("16B", 2.66), ("671B", 37.55), ("kimi_k2", 32.86)):
        args = replace(FLAVORS[flavor], mtp_layers=0)
        assert args.flops_per_token(0) / 6 + args.vocab_size * args.dim == pytest.approx(billions * 1e9, rel=2e-3)
    v3 = FLAVORS["671B"]
    more = v3.flops_per_token(0) - replace(v3, mtp_layers=0).flops_per_token(0)
    block = v3.block(61)
    of_block = block.attention.matrices(7168) + block.feed_forward.matrices(7168)
    assert more == 6 * (of_block + 2 * 7168**2 + 7168 * 129280)
    assert v3.flops_per_token(4096) - v3.flops_per_token(0) == 6 * 62 * 128 * (192 + 128) * 2048


@pytest.mark.parametrize("flavor", FLAVORS)
def test_parameter_count_is_that_of_the_model(flavor: str) -> None:
    args = FLAVORS[flavor]
    with torch.device("meta"):
        model = Decoder(args)
    assert sum(p.numel() for p in model.parameters()) == args.parameter_count()
    assert set(model.inits()) == {name for name, _ in model.named_parameters()}
    assert len(model.mtp) == args.mtp_layers
    assert [*model.get_submodule("layers.0").named_buffers()] == []


def test_the_job_says_how_far_to_look_ahead() -> None:
    args = FLAVORS["671B"]
    assert args.for_job(JobConfig()).mtp_layers == 1
    assert args.for_job(JobConfig(model=Model(mtp_layers=0))).mtp_layers == 0
    assert FLAVORS["kimi_k2"].for_job(JobConfig(model=Model(mtp_layers=2))).mtp_layers == 2


def test_experts_that_look_ahead_are_experts() -> None:
    """All blocks are dense, but the module of multi-token prediction after them is not."""
    args = replace(FLAVORS["debugmodel"], dense_layers=4)
    parallel = Parallelism(expert_parallel_degree=4)
    assert args.problems(JobConfig(parallelism=parallel)) == []
    key = "parallelism.expert_parallel_degree = 4"
    why = f"{key}: this model has no experts; set it to 1"
    assert args.problems(JobConfig(parallelism=parallel, model=Model(mtp_layers=0))) == [why]
    five = JobConfig(parallelism=Parallelism(expert_parallel_degree=5))
    assert args.problems(five) == [
        "parallelism.expert_parallel_degree = 5: 16 experts cannot be dealt evenly to 5 ranks; take a divisor of 16"
    ]


@pytest.mark.parametrize("flavor", FILES)
def test_published_configs_are_those_of_the_flavors(flavor: str) -> None:
    args = FLAVORS[flavor]
    assert ADAPTER.config_problems(FILES[flavor], args) == []
    other = {**FILES[flavor], "q_lora_rank": 768, "scoring_func": "tanh", "n_group": 2}
    want = [args.experts.groups, args.q_rank, args.experts.score]
    found = [2, 768, "tanh"]
    keys = ["n_group", "q_lora_rank", "scoring_func"]
    assert ADAPTER.config_problems(other, args) == [
        f"{key} = {json.dumps(a)}, this model has {json.dumps(b)}" for key, a, b in zip(keys, found, want, strict=True)
    ]


def test_no_shared_expert_has_two_spellings() -> None:
    args = FLAVORS["671B"]
    none = replace(args, experts=replace(args.experts, shared_hidden=0))
    for said in (0, None):
        read = {**V3, "n_shared_experts": said}
        assert ADAPTER.config_problems(read, none) == []
        assert ADAPTER.config_problems(read, args) == ["n_shared_experts = 0, this model has 1"]


def test_other_families_are_refused() -> None:
    assert ADAPTER.config_problems({**V3, "model_type": "llama"}, FLAVORS["671B"]) == [
        'model_type = "llama", this model has "deepseek_v3"'
    ]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_transformers_writes_the_same_config(flavor: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    args = FLAVORS[flavor]
    (tmp_path / "config.json").write_bytes(ADAPTER.config_bytes(args, "bfloat16"))
    config = AutoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_bytes())
    assert ADAPTER.config_problems(written, args) == []
    assert written.get("num_mtp_layers", written.get("num_nextn_predict_layers")) == args.mtp_layers


def test_args_and_names_need_no_torch() -> None:
    code = "import sys, models.deepseek_v3.args, models.deepseek_v3.hf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
