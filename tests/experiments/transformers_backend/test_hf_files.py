"""Weights go in from Hugging Face's files and out again, the same bytes, and config.json tells whose they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.runtime.errors import CheckpointError
from experiments.transformers_backend.args import Folders
from experiments.transformers_backend.build import hf_config
from experiments.transformers_backend.hf import ADAPTER, rules
from tests.experiments.transformers_backend.jobs import train
from tests.experiments.transformers_backend.small import CONFIGS, build, folder


def published(path: Path, name: str) -> str:
    """A folder as `save_pretrained` writes it, of random weights of transformers' own."""
    from transformers import AutoModelForCausalLM

    args = Folders()[folder(path, name, vocab_size=2048)]
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(hf_config(args)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_weights_go_in_and_out_unchanged(name: str, tmp_path: Path) -> None:
    """Mixtral's experts are stacked in the model, and apart in files."""
    source = published(tmp_path / "in", name)
    train(
        2,
        tmp_path / "run",
        source,
        "--training.steps=1",
        "--optimizer.lr=1e-30",  # too little to change any weight
        "--checkpoint.enable",
        f"--checkpoint.initial_load_path={source}",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.last_save_in_hf",
        "--checkpoint.export_dtype=float32",
    )
    (exported,) = (tmp_path / "run").glob("**/step-1/model.safetensors")
    before, after = load_file(Path(source) / "model.safetensors"), load_file(exported)
    assert {*after} == {*before}
    assert all(torch.equal(after[key], before[key]) for key in before)
    said = json.loads((exported.parent / "config.json").read_text())
    assert ADAPTER.config_problems(said, Folders()[source]) == []


def test_every_tensor_is_in_the_table_once(tmp_path: Path) -> None:
    for name in CONFIGS:
        args = Folders()[folder(tmp_path / name, name.removesuffix("_tied"), **CONFIGS[name])]
        model = build(args)
        tied = args.config.get("tie_word_embeddings", name == "gpt2")
        shapes = {key: tuple(p.shape) for key, p in model.named_parameters() if not (tied and key == "output.weight")}
        table = ADAPTER.table(args, shapes)
        assert {*table.ours} == {*shapes}


def test_names_are_those_that_transformers_saves(tmp_path: Path) -> None:
    def names(name: str) -> dict[str, Any]:
        return {rule.our_names[0]: rule for rule in rules(Folders()[folder(tmp_path / name, name)])}

    assert names("gpt_neox")["output.weight"].theirs == "embed_out.weight"
    mixtral = names("mixtral")
    experts = "model.layers.{layer}.block_sparse_moe.experts"
    assert mixtral["model.layers.{layer}.mlp.gate.weight"].theirs == "model.layers.{layer}.block_sparse_moe.gate.weight"
    assert mixtral["model.layers.{layer}.mlp.experts.gate_up_proj"].pieces == (
        *((f"{experts}.{expert}.w1.weight", expert * 88, 44) for expert in range(4)),
        *((f"{experts}.{expert}.w3.weight", expert * 88 + 44, 44) for expert in range(4)),
    )


def test_another_model_is_refused(tmp_path: Path) -> None:
    args = Folders()[folder(tmp_path / "one", "llama")]
    other = Folders()[folder(tmp_path / "two", "llama", rope_theta=5e5, hidden_size=48, initializer_range=0.5)]
    assert ADAPTER.config_problems(other.config, args) == [
        "head_dim = 12, this model has 8",
        "hidden_size = 48, this model has 32",
        'rope_parameters = {"rope_theta": 500000.0, "rope_type": "default"}, this model has'
        ' {"rope_theta": 10000.0, "rope_type": "default"}',
    ]
    assert ADAPTER.config_problems({"model_type": "qwen2"}, args) == ["model_type = 'qwen2', this model has 'llama'"]


def test_a_form_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    def upside_down(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.flip(0) for name, tensor in tensors.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", upside_down)
    rules.cache_clear()
    with pytest.raises(CheckpointError, match=r"^model.embed_tokens.weight is saved by transformers in another form"):
        rules(Folders()[folder(tmp_path, "llama")])
