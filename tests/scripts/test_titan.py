"""TorchTitan's checkpoints: what they hold is ours afterwards, whatever its rotation; what is forged runs nothing."""

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.manifest import read_manifest
from components.checkpoint.state import ALL_BUT_MODEL, model_tensors, optimizer_tensors
from components.checkpoint.storage import open_folder
from components.checkpoint.unpickle import METADATA, read_contents
from components.config.job_config import JobConfig
from components.config.model import Model
from components.config.moe import MoE
from components.config.optim import Optimizer
from components.layers.shapes import ExpertsShape
from components.optim.optimizers import build_optimizers
from components.runtime.errors import CheckpointError, ConfigError
from models.llama3.args import FLAVORS as LLAMA3
from models.qwen3.args import FLAVORS as QWEN3
from models.train_spec import families
from tests.ranks import run_ranks
from tests.scripts import titan_twin as titan
from tests.trainer.runs import launch, train
from trainer.build import build_on_meta, materialize, zero_buffers
from trainer.convert import Target, target_of, titan_to_dcp

SMALL: dict[str, Any] = {"dim": 24, "n_layers": 2, "vocab_size": 64}
ARGS: dict[str, Any] = {
    "llama3": replace(LLAMA3["debugmodel"], **SMALL, n_heads=3, n_kv_heads=1, ffn_hidden=40),
    "qwen3": replace(QWEN3["debugmodel"], **SMALL, n_heads=4, n_kv_heads=2, head_dim=10, ffn_hidden=40),
}
ADAM = Optimizer(name="AdamW", lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, implementation="foreach")


def target_for(name: str, **changes: Any) -> Target:
    job = JobConfig(model=Model(name=name, flavor="small"))
    return Target(name, "small", families[name].load(), replace(ARGS[name], **changes), job)


def ours(target: Target) -> Any:
    model = build_on_meta(target.spec, target.args, target.job)
    materialize(model, "cpu")
    zero_buffers(model, "cpu")
    return model


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.output(model(tokens, positions=torch.arange(tokens.shape[1]).expand(tokens.shape)))


def loaded(path: str, target: Target) -> Any:
    """Our model with its weights."""
    model = ours(target)
    store = Checkpointer(path, keep_latest_k=0, group=None)
    store.load(path, model_tensors([model]), job=None, exclude=ALL_BUT_MODEL, cast=True)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_weights_alone_give_the_same_logits(name: str, tied: bool, tmp_path: Path) -> None:
    target = target_for(name, tied_embeddings=tied)
    twin = titan.Titan(target.args, neighbours=name == "llama3")
    titan.save(tmp_path / "titan", twin, None, 0)
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "out"), target)
    assert (path, read_manifest(open_folder(path)).kind) == (str(tmp_path / "out/step-0"), "model_only")
    tokens = titan.tokens_of(target.args, 99)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded(path, target), tokens), twin(tokens), rtol=1e-5, atol=1e-5)


def test_the_rotation_matters_to_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import convert

    monkeypatch.setattr(convert, "NEIGHBOURS", {"llama3": False})
    target = target_for("llama3")
    twin = titan.Titan(target.args, neighbours=True)
    titan.save(tmp_path / "titan", twin, None, 0)
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "out"), target)
    tokens = titan.tokens_of(target.args, 99)
    with torch.no_grad():
        assert (logits(loaded(path, target), tokens) - twin(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_with_adams_state_the_next_step_is_the_same(name: str, tmp_path: Path) -> None:
    target = target_for(name)
    twin = titan.Titan(target.args, neighbours=name == "llama3")
    adam = titan.optimizer_of(twin)
    titan.train(twin, adam, target.args, range(3))
    titan.save(tmp_path / "titan", twin, adam, 3)
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "out"), target)
    assert (path, read_manifest(open_folder(path)).kind) == (str(tmp_path / "out/step-3"), "training")

    model = ours(target)
    optimizers = build_optimizers([model], ADAM, torch.device("cpu"))
    tensors = {**model_tensors([model]), **optimizer_tensors(optimizers.named_state())}
    state = Checkpointer(path, keep_latest_k=0, group=None).load(path, tensors, job=None, exclude=["dataloader", "rng"])
    train_state = {"step": 3, "tokens": 72, "recent": [], "passed_over": []}
    assert state == {"train_state": train_state, "lr_scheduler": {"start": 0}}
    tokens = titan.tokens_of(target.args, 3)
    titan.loss_of(logits(model, tokens), tokens).backward()
    optimizers.step()

    titan.train(twin, adam, target.args, range(3, 4))
    titan.save(tmp_path / "later", twin, adam, 4)
    later = loaded(titan_to_dcp(str(tmp_path / "later"), str(tmp_path / "out"), target), target)
    expected = dict(later.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[parameter_name], rtol=1e-5, atol=1e-6)
    weights = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "weights"), target, "bfloat16", weights_only=True)
    manifest = read_manifest(open_folder(weights))
    assert (weights, manifest.kind) == (str(tmp_path / "weights/step-0"), "model_only")


@pytest.mark.slow
def test_a_job_goes_on_from_it_with_the_steps_and_the_moments(tmp_path: Path) -> None:
    args = LLAMA3["debugmodel"]
    twin = titan.Titan(args, neighbours=True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.1 if parameter.ndim > 1 else 1.0)
    adam = titan.optimizer_of(twin)
    titan.train(twin, adam, args, range(2))
    titan.save(tmp_path / "titan", twin, adam, 2)
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "dcp"), target_of("llama3", "debugmodel"))
    model = ("--experimental.custom_import=", "--model.name=llama3", "--model.flavor=debugmodel")
    start = ("--checkpoint.enable=true", f"--checkpoint.initial_load_path={path}")
    whole = (*model, *start, "--checkpoint.initial_load_model_only=false", "--training.steps=4")
    (told,) = launch(1, tmp_path / "refused", *whole)
    assert told.code == 2
    assert "missing in its state: dataloader" in told.stderr
    found = train(1, tmp_path / "run", *whole, "--checkpoint.exclude_from_loading=dataloader")
    weights = train(1, tmp_path / "weights", *model, *start, "--training.steps=4")
    assert [record["step"] for record in found] == [3, 4]
    assert [record["step"] for record in weights] == [1, 2, 3, 4]
    assert found[0]["loss"] == weights[0]["loss"]  # the same weights on the same rows
    assert found[1]["loss"] != weights[1]["loss"]  # moved by moments that were there


def saved_by_ranks(folder: Path) -> None:
    args = ARGS["llama3"]
    twin = titan.Titan(args, neighbours=True)
    for block in twin.layers.values():
        fully_shard(block)
    fully_shard(twin)
    adam = titan.optimizer_of(twin)
    titan.train(twin, adam, args, range(2))
    titan.save(folder, twin, adam, 2, alone=False)


def test_shards_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    run_ranks(2, saved_by_ranks, tmp_path / "titan")
    assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in (tmp_path / "titan").iterdir()}
    target = target_for("llama3")
    twin = titan.Titan(target.args, neighbours=True)
    adam = titan.optimizer_of(twin)
    titan.train(twin, adam, target.args, range(2))
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "out"), target)
    tokens = titan.tokens_of(target.args, 99)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded(path, target), tokens), twin(tokens), rtol=1e-4, atol=1e-4)


def test_experts_and_their_selection_bias_are_taken_over(tmp_path: Path) -> None:
    experts = ExpertsShape(count=4, per_token=2, hidden=20)
    target = target_for("qwen3", experts=experts, ffn_hidden=0)
    biased = ours(replace(target, job=replace(target.job, moe=MoE(bias_rate=0.001))))
    theirs = {name: torch.randn_like(tensor) for name, tensor in biased.state_dict().items()}
    assert {"layers.1.moe.experts.w2", "layers.1.moe.router.gate.weight", "layers.1.moe.expert_bias"} <= {*theirs}
    titan.write(tmp_path / "titan", theirs)
    path = titan_to_dcp(str(tmp_path / "titan"), str(tmp_path / "out"), target)
    found = loaded(path, target_of_checkpoint_like(path, target))
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def target_of_checkpoint_like(path: str, target: Target) -> Target:
    """The target with the selection bias that the checkpoint's fingerprint says it has."""
    rate = read_manifest(open_folder(path)).fingerprint["moe.bias_rate"]
    return replace(target, job=replace(target.job, moe=MoE(bias_rate=rate)))


def error_of(folder: Path, target: Target, **how: Any) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        titan_to_dcp(str(folder), str(folder / "out"), target, **how)
    return str(caught.value)


def test_another_model_is_refused_with_everything_that_differs(tmp_path: Path) -> None:
    twin = titan.Titan(ARGS["llama3"], neighbours=True)
    titan.save(tmp_path, twin, None, 0)
    assert error_of(tmp_path, target_for("qwen3", n_layers=1)) == (
        f"'{tmp_path}': the model's tensors do not fit: missing: layers.0.attention.k_norm.weight,"
        " layers.0.attention.q_norm.weight; not expected: layers.1.attention.wk.weight,"
        " layers.1.attention.wo.weight, layers.1.attention.wq.weight, layers.1.attention.wv.weight,"
        " layers.1.attention_norm.weight, layers.1.feed_forward.w1.weight, layers.1.feed_forward.w2.weight,"
        " layers.1.feed_forward.w3.weight and 1 more; layers.0.attention.wk.weight has shape [8, 24], this model"
        " [20, 24]; layers.0.attention.wo.weight has shape [24, 24], this model [24, 40];"
        " layers.0.attention.wq.weight has shape [24, 24], this model [40, 24]; layers.0.attention.wv.weight has shape"
        " [8, 24], this model [20, 24]"
    )
    assert "TorchTitan's checkpoints are read of llama3, qwen3" in error_of(tmp_path, target_of("gemma3", "debugmodel"))


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    twin = titan.Titan(ARGS["llama3"], neighbours=True)
    titan.save(tmp_path, twin, None, 0)
    titan_to_dcp(str(tmp_path), str(tmp_path / "out"), target_for("llama3"))
    assert error_of(tmp_path, target_for("llama3")).endswith("is there already: move it away, or take another folder")


class Evil:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


SEEN: list[str] = []
WATCHED = ("os.system", "subprocess.Popen", "exec", "compile", "import", "socket.connect", "os.remove", "os.rename")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if SEEN and event in WATCHED:
        SEEN.append(event)


sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "true"), "posix.system"),
        (Evil(eval, "1 + 1"), "builtins.eval"),
        (Evil(getattr, "text", "upper"), "builtins.getattr"),
        (Evil(torch.load, "x"), "torch.serialization.load"),
        (Evil(torch.Tensor), "torch.Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forged_metadata_run_nothing_and_are_refused_by_name(evil: Evil, name: str, tmp_path: Path) -> None:
    twin = titan.Titan(ARGS["llama3"], neighbours=True)
    titan.save(tmp_path, twin, None, 0)
    metadata = pickle.loads((tmp_path / METADATA).read_bytes())
    metadata.planner_data = evil
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    folder = open_folder(str(tmp_path))
    SEEN[:] = ["on"]
    try:
        with pytest.raises(CheckpointError) as caught:
            read_contents(folder)
    finally:
        events, SEEN[:] = SEEN[1:], []
    assert str(caught.value) == f".metadata names {name}, which is nothing of a checkpoint's: it is not read"
    assert events == []


def test_metadata_that_point_elsewhere_are_refused(tmp_path: Path) -> None:
    twin = titan.Titan(ARGS["llama3"], neighbours=True)
    titan.save(tmp_path, twin, None, 0)
    raw = (tmp_path / METADATA).read_bytes()

    def problem(change: Callable[[Any], None]) -> str:
        metadata = pickle.loads(raw)
        change(next(iter(metadata.storage_data.values())))
        (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError) as caught:
            read_contents(open_folder(str(tmp_path)))
        return str(caught.value)

    assert "which is no file of the checkpoint" in problem(lambda info: setattr(info, "relative_path", "../secret"))
    assert "reaches beyond the end of" in problem(lambda info: setattr(info, "length", 1 << 40))
    assert "is no number of bytes" in problem(lambda info: setattr(info, "offset", -1))
    (tmp_path / METADATA).write_bytes(raw[:100])
    with pytest.raises(CheckpointError, match=r"\.metadata is not readable"):
        read_contents(open_folder(str(tmp_path)))
