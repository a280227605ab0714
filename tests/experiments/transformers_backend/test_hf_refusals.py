"""What cannot be trained, or not in that layout, is refused with the module and the reason."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from components.mesh.plan import Columns, Gathered, Rows
from components.runtime.errors import ConfigError
from experiments.transformers_backend.args import Folders
from experiments.transformers_backend.model import HFModel
from experiments.transformers_backend.plan import tensor_styles
from tests.experiments.transformers_backend.small import folder
from trainer.config.load import load_job


def problems(path: Path, name: str, *argv: str, **fields: Any) -> list[str]:
    return Folders()[folder(path, name, **fields)].problems(load_job(["--training.seq_len=32", *argv], {}).job)


def tensor(path: Path, name: str, degree: int = 2, **fields: Any) -> list[str]:
    lines = problems(path, name, f"--parallelism.tensor_parallel_degree={degree}", **fields)
    start, end = f"parallelism.tensor_parallel_degree = {degree}: ", "; set it to 1"
    return [line.removeprefix(start).removesuffix(end) for line in lines]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3", "cohere"])
def test_tensor_parallelism_follows_the_plan_that_the_model_ships(name: str, tmp_path: Path) -> None:
    assert tensor(tmp_path, name) == []


def test_a_plan_is_derived_where_the_model_ships_none(tmp_path: Path) -> None:
    args = Folders()[folder(tmp_path, "olmo", base_model_tp_plan=None)]
    with torch.device("meta"):
        styles, reasons = tensor_styles(HFModel(args))
    attention, feed_forward = "model.layers.*.self_attn", "model.layers.*.mlp"
    assert reasons == []
    assert styles == {
        attention: Gathered(),
        **{f"{attention}.{name}_proj": Columns(unit=8) for name in "qkv"},
        f"{attention}.o_proj": Rows(unit=8),
        feed_forward: Gathered(),
        f"{feed_forward}.gate_proj": Columns(),
        f"{feed_forward}.up_proj": Columns(),
        f"{feed_forward}.down_proj": Rows(),
    }
    assert tensor(tmp_path, "olmo", base_model_tp_plan=None) == []


def test_heads_that_cannot_be_dealt_out(tmp_path: Path) -> None:
    assert tensor(tmp_path, "llama", 3) == [
        "each rank computes whole heads, but 3 does not divide the 4 heads; take 1, 2 or 4"
    ]


@pytest.mark.parametrize(
    ("name", "fields", "reasons"),
    [
        (
            "gpt_neox",
            {},
            [
                "model.layers.*.attention: the features of query_key_value (32 to 96), dense (32 to 32) cannot be dealt"
                " out, since several matrices are fused in one"
            ],
        ),
        ("gemma2", {}, ["model.embed_tokens is a Gemma2TextScaledWordEmbedding, which does more than to look up"]),
        (
            "stablelm",
            {},
            [
                "the code of StableLmModel counts on all heads and features (shape '[1, 8, 4, 8]' is invalid for input"
                " of size 128)"
            ],
        ),
        (
            "llama",
            {"pad_token_id": 0},
            ["model.embed_tokens has an entry that is not trained; set pad_token_id to null in config.json"],
        ),
        (
            "olmo2",
            {},
            [
                f"model.layers.*.self_attn.{module}: {kind!r} of the model's plan has no counterpart here"
                for module, kind in (
                    ("q_proj", "colwise_gather_output"),
                    ("k_proj", "colwise_gather_output"),
                    ("v_proj", "colwise_gather_output"),
                    ("o_proj", "rowwise_split_input"),
                )
            ],
        ),
        (
            "qwen3_moe",
            {},
            [
                "model.layers.*.mlp.experts: 'packed_colwise' of the model's plan has no counterpart here",
                "model.layers.*.mlp.gate: nothing says how Qwen3MoeTopKRouter is cut",
            ],
        ),
    ],
)
def test_tensor_parallelism_is_refused_by_name(
    name: str, fields: dict[str, Any], reasons: list[str], tmp_path: Path
) -> None:
    assert tensor(tmp_path, name, **fields) == reasons


def test_gpt2_is_data_parallel_only(tmp_path: Path) -> None:
    uncut = "something happens to hidden states between wte and h.0"
    assert tensor(tmp_path, "gpt2") == [
        uncut,
        *(
            f"model.h.*.{part}: nothing says how Conv1D is cut"
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        "model.wpe: nothing says how Embedding is cut",
    ]
    assert problems(tmp_path, "gpt2", "--parallelism.pipeline_parallel_degree=2") == [
        f"parallelism.pipeline_parallel_degree = 2: {uncut}; set it to 1"
    ]


def test_layouts_that_no_model_can(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "qwen3_moe",
        "--parallelism.context_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
        "--moe.balance_coefficient=0.1",
        "--comm.mode=local_tensor",
        "--training.seq_len=128",
    )
    assert found == [
        "parallelism.context_parallel_degree = 2: attention of transformers' models cannot be cut along the sequence;"
        " set it to 1",
        "parallelism.expert_parallel_degree = 2: experts of transformers' models cannot be dealt out; set it to 1",
        "moe.balance_coefficient = 0.1: transformers' routers are not balanced here; leave it out",
        'comm.mode = "local_tensor": transformers\' models run in processes of their own only; take "default"',
        "training.seq_len = 128: longer than the 64 tokens this flavor was made for; shorten it",
    ]


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        (
            "gpt2",
            {"resid_pdrop": 0.1},
            "dropout of 0.1: it would draw differently in every layout; set resid_pdrop to 0 there",
        ),
        (
            "llama",
            {"attention_dropout": 0.2},
            "dropout of 0.2: it would draw differently in every layout; set attention_dropout to 0 there",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic': frequencies would depend on the longest row of each microbatch",
        ),
        ("llama", {"model_type": "x"}, "the installed transformers knows no model_type 'x'; code beside it is not run"),
        ("llama", {"model_type": "falcon"}, "falcon computes attention of its own, across documents"),
        (
            "llama",
            {"model_type": "opt", "dropout": 0, "word_embed_proj_dim": 32},
            "OPTForCausalLM does something between its body and its head",
        ),
        (
            "llama",
            {"model_type": "bloom"},
            "BloomForCausalLM takes no position_ids, which each packed document counts anew",
        ),
        (
            "llama",
            {"model_type": "bert", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
            "BertLMHeadModel cannot run without values: BertSelfAttention looks ahead",
        ),
        (
            "llama",
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "Lfm2ForCausalLM cannot run without values: Tensor.item() cannot be called on meta tensors",
        ),
        ("llama", {"model_type": "t5"}, "t5 is not a plain causal language model"),
        ("llama", {"quantization_config": {}}, "quantization_config is there, but quantized weights cannot be trained"),
    ],
)
def test_models_that_cannot_be_trained(name: str, fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        problems(tmp_path, name, **fields)
    assert str(caught.value) == f"model.flavor = {str(tmp_path)!r}: config.json: {why}"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.flavor = 'nowhere': no folder with a config.json; give the folder"):
        Folders()["nowhere"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read as JSON: Expecting property name"):
        Folders()[str(tmp_path)]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config.json is not a model's: it has no model_type"):
        Folders()[str(tmp_path)]


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"^model.name = \"transformers\": needs the package transformers, version 5"):
        problems(tmp_path, "llama", vocab_size=66)
