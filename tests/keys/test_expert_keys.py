"""What the keys of experts do, in a real step."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.keys.jobs import SMALL, surroundings
from tests.ranks import run_ranks

shows = pytest.mark.shows
TINY_MOE = (
    *SMALL,
    "--experimental.custom_import=tests.models.qwen3.tiny",
    "--model.name=tiny_qwen3",
    "--model.flavor=moe",
    "--training.steps=1",
)


def looked_at(argv: list[str], environ: dict[str, str]) -> dict[str, Any]:
    """The first layer of experts in a job's only step, on this rank."""
    os.environ.update(environ)
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    class Watching(Trainer):
        found: dict[str, Any]

        def update(self, rows: Any, facts: Any) -> Any:
            moe = self.models[0].get_submodule("layers.0.moe")
            weight, gate = (moe.get_parameter(name) for name in ("experts.w1", "router.gate.weight"))
            gradient = gate.grad.full_tensor() if isinstance(gate.grad, DTensor) else gate.grad
            buffers = dict(moe.named_buffers())
            counts = buffers["tokens_per_expert"].clone() if "tokens_per_expert" in buffers else None
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            self.found = {"loss": facts.values.loss, "shape": tuple(local.shape), "gate": gradient, "counts": counts}
            return super().update(rows, facts)

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Watching(resolved, os.environ)
    trainer.train()
    buffers = dict(trainer.models[0].get_submodule("layers.0.moe").named_buffers())
    return trainer.found | {"bias": buffers.get("expert_bias")}


def look(folder: Path, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    argv = [*TINY_MOE, f"--job.dump_folder={folder}", *arguments]
    return run_ranks(ranks, looked_at, argv, surroundings(), backend=None)[0]


@shows("parallelism.expert_parallel_degree")
@shows("parallelism.expert_tensor_parallel_degree")
@pytest.mark.parametrize(
    ("expert", "tensor", "shape"), [(1, 1, (3, 14, 24)), (2, 1, (3, 14, 24)), (2, 2, (3, 7, 24)), (1, 2, (3, 7, 24))]
)
def test_degrees(expert: int, tensor: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Six experts, 14 wide: three of them whole on each of two ranks; or on each of four, halves of three."""
    keys = {"expert_parallel": expert, "expert_tensor_parallel": tensor, "tensor_parallel": 2}
    arguments = [f"--parallelism.{key}_degree={degree}" for key, degree in keys.items()]
    ranks = 4 if tensor == 2 else 2
    assert look(tmp_path, *arguments, ranks=ranks)["shape"] == shape


@shows("debug.moe_force_load_balance")
def test_forced_balance(tmp_path: Path) -> None:
    free, forced = look(tmp_path / "free"), look(tmp_path / "forced", "--debug.moe_force_load_balance")
    each = 4 * 24 * 3 // 6
    assert forced["counts"].tolist() == [each] * 6
    assert free["counts"].tolist() != [each] * 6
    assert free["counts"].sum() == 6 * each
    assert forced["loss"] != free["loss"]


@shows("moe.balance_coefficient")
def test_balance_coefficient(tmp_path: Path) -> None:
    """The loss that is told stays; the router's gradient moves in proportion."""
    found = [look(tmp_path / str(c), f"--moe.balance_coefficient={c}") for c in (0.0, 1.0, 2.0)]
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    once, twice = found[1]["gate"] - found[0]["gate"], found[2]["gate"] - found[0]["gate"]
    assert once.norm() > 0.1 * found[0]["gate"].norm()
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


@shows("moe.bias_rate")
def test_bias_rate(tmp_path: Path) -> None:
    found = look(tmp_path / "a", "--moe.bias_rate=0.125")
    expected = 0.125 * (found["counts"].sum() / 6 - found["counts"]).sign()
    assert expected.abs().sum() > 0
    assert torch.equal(found["bias"], expected)
    assert look(tmp_path / "b", "--moe.bias_rate=0")["bias"] is None
