"""Checkpoints do not know of pipelines: saved on some stages, resumed on others or on none, bit for bit the same."""

from pathlib import Path

import pytest
import torch

from tests.components.parallel.pipeline_jobs import Computed, run

PP = "--parallelism.pipeline_parallel_degree"
V = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
SAVE = ("--checkpoint.enable", "--checkpoint.interval=1")


def equal(a: Computed, b: Computed) -> None:
    assert a.values.keys() == b.values.keys()
    for name, value in a.values.items():
        assert torch.equal(value, b.values[name]), name


@pytest.mark.parametrize("flavor", [pytest.param("deep", marks=pytest.mark.slow), "deep_tied"])
def test_checkpoints_move_between_layouts(flavor: str, tmp_path: Path) -> None:
    model = f"--model.flavor={flavor}"
    saved = run(2, tmp_path, {"loop": (model, f"{PP}=2", *SAVE), "v": (model, f"{PP}=2", V, *SAVE)})
    whole = run(1, tmp_path, {"whole": (model, *SAVE)})["whole"]
    loads = {
        name: (model, "--checkpoint.enable", "--checkpoint.load_only", f"--job.dump_folder={tmp_path}/{folder}")
        for name, folder in (("loop", "2-loop"), ("v", "2-v"), ("whole", "1-whole"))
    }
    alone = run(1, tmp_path, loads)  # all steps are done: they load, and that is all
    for name, want in {**saved, "whole": whole}.items():
        equal(alone[name], want)
    crossed = {
        "v": (*loads["loop"], f"{PP}=2", V),
        "loop": (*loads["v"], f"{PP}=2"),
        "whole": (*loads["whole"], f"{PP}=2", V),
    }
    found = run(2, tmp_path, crossed)
    equal(found["v"], saved["loop"])
    equal(found["loop"], saved["v"])
    equal(found["whole"], whole)


def test_a_job_goes_on_with_another_pipeline(tmp_path: Path) -> None:
    """Optimizer states are carried too: step 2 after a change of layout is step 2 without one."""
    job = ("--model.flavor=deep_tied", "--lr_scheduler.total_steps=2")
    through = run(1, tmp_path, {"through": job})["through"]
    folder = f"--job.dump_folder={tmp_path}/moving"
    run(2, tmp_path, {"one": (*job, f"{PP}=2", folder, *SAVE, "--training.steps=1")})
    found = run(2, tmp_path, {"two": (*job, f"{PP}=2", V, folder, *SAVE)})["two"]
    assert len(found.steps) == 1
    for name, value in through.values.items():
        assert (found.values[name] - value).norm() <= 1e-6 * value.norm(), name
