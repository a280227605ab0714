"""What the keys of multi-token prediction do, in a real step."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.keys.jobs import SMALL, surroundings
from tests.ranks import run_ranks
from trainer.config.inactive import inactive
from trainer.config.load import load_job

shows = pytest.mark.shows
TINY = (
    *SMALL,
    "--experimental.custom_import=tests.models.deepseek_v3.tiny",
    "--model.name=tiny_deepseek",
    "--model.flavor=dense",
    "--training.steps=1",
)


def looked_at(argv: list[str], environ: dict[str, str]) -> dict[str, Any]:
    """The loss of a job's only step, and the gradients of modules and embedding."""
    os.environ.update(environ)
    from trainer.command import import_custom
    from trainer.trainer import Trainer

    class Watching(Trainer):
        found: dict[str, Any]

        def update(self, rows: Any, facts: Any) -> Any:
            gradients = {name: p.grad.clone() for name, p in self.models[0].named_parameters() if p.grad is not None}
            self.found = {"loss": facts.values.loss, "gradients": gradients}
            return super().update(rows, facts)

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Watching(resolved, os.environ)
    trainer.train()
    return trainer.found


def look(folder: Path, *arguments: str) -> tuple[float, dict[str, torch.Tensor]]:
    argv = [*TINY, f"--job.dump_folder={folder}", *arguments]
    found = run_ranks(1, looked_at, argv, surroundings(), backend=None)[0]
    return found["loss"], found["gradients"]


@shows("loss.mtp_coefficient")
@shows("model.mtp_layers")
def test_modules_and_their_weight(tmp_path: Path) -> None:
    """The loss that is told stays; what modules add to gradients moves in proportion, and goes with them."""
    none = look(tmp_path / "0", "--model.mtp_layers=0")
    once = look(tmp_path / "1", "--loss.mtp_coefficient=0.2", "--model.mtp_layers=1")
    twice = look(tmp_path / "2", "--loss.mtp_coefficient=0.4", "--model.mtp_layers=1")
    assert none[0] == once[0] == twice[0]
    assert {name.split(".")[1] for name in once[1] if name.startswith("mtp.")} == {"0"}
    assert [name for name in none[1] if name.startswith("mtp.")] == []
    matrix = "mtp.0.eh_proj.weight"
    assert once[1][matrix].norm() > 0
    torch.testing.assert_close(twice[1][matrix], 2 * once[1][matrix], rtol=1e-4, atol=1e-7)
    name = "layers.0.attention.wkv_a.weight"
    added, more = once[1][name] - none[1][name], twice[1][name] - none[1][name]
    assert added.norm() > 0.01 * none[1][name].norm()
    torch.testing.assert_close(more, 2 * added, rtol=1e-3, atol=1e-6)


def test_the_weight_is_inactive_without_modules() -> None:
    why = "the model has no modules of multi-token prediction"

    def told(*arguments: str) -> str | None:
        return inactive(load_job(arguments, {}).job, "loss.mtp_coefficient")

    deepseek = ("--model.name=deepseek_v3", "--model.flavor=671B")
    assert told() == why
    assert told("--model.mtp_layers=1") is None
    assert told(*deepseek) is None
    assert told(*deepseek, "--model.mtp_layers=0") == why
    assert told("--model.name=ours", "--experimental.custom_import=ours") is None
