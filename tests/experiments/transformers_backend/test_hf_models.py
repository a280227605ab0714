"""Every kind of model computes what transformers computes for each document alone: logits, and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.initialize import Constant, Normal
from components.mesh.projection import Projection
from experiments.transformers_backend.args import Folders
from experiments.transformers_backend.model import HFModel
from tests.experiments.transformers_backend.small import CONFIGS, build, folder, theirs

LENGTHS = (7, 9, 4)
WINDOWED = ("mistral", "gemma2")


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def gradients(model: Any, names: dict[str, str]) -> dict[str, Tensor]:
    return {ours: model.get_parameter(name).grad.clone() for ours, name in names.items()}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient_are_those_of_transformers(name: str, packed: bool, tmp_path: Path) -> None:
    args = Folders()[folder(tmp_path, name.removesuffix("_tied"), **CONFIGS[name])]
    model = build(args)
    lengths = LENGTHS if packed else (sum(LENGTHS),)
    tokens = torch.randint(67, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    given = {"positions": positions, **({"document_ids": documents} if packed else {})}
    logits = model.output(model(tokens, **given))
    other, names = theirs(args, model)
    pieces = tokens.split(lengths, dim=1)
    expected = [other(piece).logits for piece in pieces]
    torch.testing.assert_close(logits, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
    mine = torch.stack([loss_of(*pair) for pair in zip(logits.split(lengths, dim=1), pieces, strict=True)]).sum()
    want = torch.stack([loss_of(*pair) for pair in zip(expected, pieces, strict=True)]).sum()
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=0)
    torch.autograd.backward([mine, want])
    for ours, gradient in gradients(other, names).items():
        found = gradients(model, {ours: ours})[ours]
        assert (found - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, ours


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_matters(name: str, tmp_path: Path) -> None:
    """Else the tests above would show nothing of windows."""
    narrow = build(Folders()[folder(tmp_path / "narrow", name)])
    wide = build(Folders()[folder(tmp_path / "wide", name, sliding_window=40)])
    tokens, positions = torch.arange(20)[None], torch.arange(20)[None]
    a, b = (model(tokens, positions=positions) for model in (narrow, wide))
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a - b)[:, 5:].abs().max() > 0.1


def test_first_values_are_those_that_transformers_draws(tmp_path: Path) -> None:
    gpt2 = build(Folders()[folder(tmp_path / "gpt2", "gpt2")]).inits()
    assert gpt2["model.h.1.attn.c_attn.weight"] == Normal(0.2)
    assert gpt2["model.h.1.mlp.c_proj.weight"] == Normal(0.1)  # / √(2 layers)
    assert gpt2["model.h.1.mlp.c_proj.bias"] == Constant(0.0)
    assert gpt2["model.ln_f.weight"] == Constant(1.0)
    gemma = build(Folders()[folder(tmp_path / "gemma2", "gemma2")]).inits()
    assert gemma["model.norm.weight"] == Constant(0.0)  # Gemma's norms add 1
    assert gemma["output.weight"] == gemma["model.embed_tokens.weight"] == Normal(0.2)


def test_derived_tensors_survive_the_meta_device(tmp_path: Path) -> None:
    model = build(Folders()[folder(tmp_path, "gemma2")])
    model(torch.zeros(1, 4, dtype=torch.int64), positions=torch.arange(4)[None])
    assert list(model.buffers()) == []
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)  # pyrefly: ignore[missing-attribute]
    assert model.model.embed_tokens.embed_scale.item() == pytest.approx(32**0.5)  # pyrefly: ignore[missing-attribute]


@pytest.mark.parametrize(("name", "parameters"), [("llama", 19040), ("llama_tied", 16896), ("mixtral", 44640)])
def test_counts(name: str, parameters: int, tmp_path: Path) -> None:
    args = Folders()[folder(tmp_path, name.removesuffix("_tied"), **CONFIGS[name])]
    assert args.parameter_count() == parameters == sum(p.numel() for p in build(args).parameters())
    assert (args.vocab_size, args.n_layers) == (67, 2)


def test_flops(tmp_path: Path) -> None:
    attention, feed_forward, head = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 44, 67 * 32
    dense, scores = 2 * (attention + feed_forward) + head, 2 * 64  # 4 heads × (8 + 8), in two layers
    llama = Folders()[folder(tmp_path / "llama", "llama")]
    assert llama.flops_per_token(64) == 6 * dense + 6 * scores * 32
    mistral = Folders()[folder(tmp_path / "mistral", "mistral")]
    assert mistral.flops_per_token(64) == 6 * dense + 6 * scores * (5 - 25 / 128)
    mixtral = Folders()[folder(tmp_path / "mixtral", "mixtral")]  # two experts and a router
    assert mixtral.flops_per_token(64) == 6 * (dense + 2 * (feed_forward + 4 * 32)) + 6 * scores * 32


def test_the_head_bends_its_logits_inside_of_a_loss(tmp_path: Path) -> None:
    model: HFModel = build(Folders()[folder(tmp_path, "gemma2")])
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1)) * 9

    def apply(x: Tensor, project: Projection) -> Tensor:
        return project(x[:, :2])

    want = 3.0 * torch.tanh(F.linear(hidden, model.output.weight) / 3.0)
    torch.testing.assert_close(model.output(hidden), want)
    torch.testing.assert_close(model.output(hidden, apply), want[:, :2])
