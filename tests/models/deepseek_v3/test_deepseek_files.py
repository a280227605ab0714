"""Hugging Face files of models that look ahead: what is exported, what is imported, what is left out."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.runtime.errors import CheckpointError
from models.decoder.model import Decoder
from models.deepseek_v3.hf import ADAPTER
from tests.models.deepseek_v3.tiny import EXPERTS, TINY
from tests.models.hf_twins import build, config_of, export, load, rewrite_config, save

ARGS = replace(TINY, vocab_size=61)
PLAIN = replace(ARGS, mtp_layers=0)


def exported(root: Path, dtype: str = "float32") -> tuple[Decoder, Path]:
    model = build(Decoder, ARGS)
    save(root, model)
    return model, Path(export(root, ADAPTER, ARGS, dtype=dtype).path)


def read(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict


def test_modules_are_further_layers_with_copies_of_embedding_and_head(tmp_path: Path) -> None:
    model, folder = exported(tmp_path)
    files = read(folder)
    for k in range(2):
        own, theirs = f"mtp.{k}", f"model.layers.{2 + k}"
        assert torch.equal(files[f"{theirs}.eh_proj.weight"], model.get_parameter(f"{own}.eh_proj.weight"))
        assert torch.equal(files[f"{theirs}.shared_head.norm.weight"], model.get_parameter(f"mtp_norms.{k}.weight"))
        assert torch.equal(
            files[f"{theirs}.mlp.experts.3.up_proj.weight"], model.get_parameter(f"{own}.block.moe.experts.w3")[3]
        )
        assert torch.equal(files[f"{theirs}.embed_tokens.weight"], model.tok_embeddings.weight)
        assert torch.equal(files[f"{theirs}.shared_head.head.weight"], model.output.weight)
    assert config_of(folder)["num_nextn_predict_layers"] == 2
    again = build(Decoder, ARGS, seed=9)
    load(folder, again, ADAPTER, ARGS)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_selection_biases_stay_fp32(tmp_path: Path) -> None:
    model, folder = exported(tmp_path, "bfloat16")
    files = read(folder)
    assert torch.equal(
        files["model.layers.1.mlp.gate.e_score_correction_bias"], model.get_buffer("layers.1.moe.expert_bias")
    )
    assert {value.dtype for name, value in files.items() if "e_score" not in name} == {torch.bfloat16}


def test_a_model_that_does_not_look_ahead_leaves_them_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = exported(tmp_path)
    published = {name: value for name, value in read(folder).items() if not name.startswith("model.layers.3.")}
    save_file(published, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    plain = build(Decoder, PLAIN, seed=9)
    with caplog.at_level(logging.INFO):
        load(folder, plain, ADAPTER, PLAIN)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    count = sum(name.startswith("model.layers.2.") for name in published)
    assert f"left out {count} tensors" in caplog.text


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    _, folder = exported(tmp_path)
    files = read(folder)
    files["model.layers.3.shared_head.head.weight"] += 1
    save_file(files, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"model.layers.3.shared_head.head.weight is not the same as lm_head.weight"
    ):
        load(folder, build(Decoder, ARGS), ADAPTER, ARGS)


def test_files_without_modules_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    model = build(Decoder, PLAIN)
    save(tmp_path, model)
    folder = Path(export(tmp_path, ADAPTER, PLAIN).path)
    with pytest.raises(CheckpointError, match=r"missing: .*model.layers.2.eh_proj.weight"):
        load(folder, build(Decoder, ARGS), ADAPTER, ARGS)


def test_v2_keeps_its_selection_bias_to_itself(tmp_path: Path) -> None:
    experts = replace(
        EXPERTS, score="softmax", selection_bias=False, normalize=False, bias_rate=0.01, groups=1, top_groups=1
    )
    args = replace(PLAIN, experts=experts)
    save(tmp_path, build(Decoder, args))
    folder = Path(export(tmp_path, ADAPTER, args).path)
    assert not [name for name in read(folder) if "bias" in name]
    assert config_of(folder)["model_type"] == "deepseek_v2"
    rewrite_config(folder, model_type="kimi_k2")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match='model_type = "deepseek_v3", this model has "deepseek_v2"'):
        load(folder, build(Decoder, args), ADAPTER, args)
