"""`optimizer.early_step_in_backward`: the same numbers as the usual step, with one gradient alive at a time."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.keys.test_every_key import problems
from tests.ranks import run_ranks
from tests.trainer.runs import TINY, facts, launch, meeting_point, records

KEY = "--optimizer.early_step_in_backward"
UNCLIPPED = "--training.max_norm=inf"
REPLICATE = "--parallelism.data_parallel_replicate_degree=2"
LAYOUTS = {
    "one rank": (1, ("--training.local_batch_size=12",)),
    "one rank, accumulation, tied": (1, ("--training.local_batch_size=5", "--model.flavor=tied")),
    "FSDP, accumulation": (2, ("--training.local_batch_size=2",)),
    "DDP, accumulation, tied": (2, ("--training.local_batch_size=2", REPLICATE, "--model.flavor=tied")),
    "pipeline, accumulation, tied": (
        2,
        (
            "--parallelism.pipeline_parallel_degree=2",
            "--training.local_batch_size=4",
            "--model.flavor=deep_tied",
        ),
    ),
    "FSDP, offloaded, chunked loss": (
        2,
        ("--training.local_batch_size=6", "--training.enable_cpu_offload", "--loss.name=chunked_cross_entropy"),
    ),
}


def run(argv: list[str], environ: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, Tensor], int]:
    """Step records, final weights, and the most gradients of parameters that were alive when one was stepped."""
    os.environ.update(environ)
    from components.optim import optimizers
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    alive = [0]
    usual = optimizers.Optimizers.step_one

    def counting(self: optimizers.Optimizers, parameter: torch.nn.Parameter) -> None:
        alive.append(sum(p.grad is not None for p in self.parameters))
        usual(self, parameter)

    optimizers.Optimizers.step_one = counting
    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Trainer(resolved, os.environ)
    trainer.train()
    named = trainer.models[0].named_parameters()
    weights = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}
    trainer.close()
    return records(Path(resolved.job.job.dump_folder)), weights, max(alive)


@pytest.mark.shows("optimizer.early_step_in_backward")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_numbers_as_the_usual_step(name: str, tmp_path: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    common = [*TINY, *arguments, UNCLIPPED, "--optimizer.parameter_groups=[{pattern='norm', weight_decay=0.0}]"]
    (usual, want, _), *_ = run_ranks(
        ranks, run, [*common, f"--job.dump_folder={tmp_path}/usual"], meeting_point(), backend=None
    )
    (early, got, alive), *_ = run_ranks(
        ranks, run, [*common, KEY, f"--job.dump_folder={tmp_path}/early"], meeting_point(), backend=None
    )
    assert [facts(record) for record in early] == [pytest.approx(facts(record), rel=1e-6) for record in usual]
    assert [record["lr"] for record in early] == [record["lr"] for record in usual]
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-8)
    if "accumulation" not in name:
        assert alive == 1  # under accumulation the others' sums wait for the last microbatch


def test_what_is_not_finite_stops_and_says_that_weights_have_moved(tmp_path: Path) -> None:
    arguments = ("--experimental.custom_import=tests.trainer.broken_losses", "--loss.name=nan_on_rank_one")
    outcomes = launch(2, tmp_path, *arguments, KEY, UNCLIPPED, "--training.local_batch_size=6")
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert outcomes[0].stderr.splitlines()[-1] == (
        "error: not finite but weights have moved (optimizer.early_step_in_backward): go back to a checkpoint:"
        " step 2: loss nan, gradient norm nan (rank 1: loss)"
    )


def test_what_it_cannot_go_with() -> None:
    found = problems((KEY, "--training.on_nonfinite=skip", "--debug.compare_ranks=3"), 2)
    begin = "optimizer.early_step_in_backward = true: "
    assert [line.removeprefix(begin) for line in found if line.startswith(begin)] == [
        "weights move before the norm of all gradients is known, so that nothing can be clipped to training.max_norm ="
        " 1; set that to inf, or this to false",
        "weights move before a step is known to be bad, so that none can be skipped; set training.on_nonfinite"
        ' to "stop" or "rollback", or this to false',
        "no gradient is left for debug.compare_ranks = 3; set that to 0",
    ]
    assert problems((KEY, UNCLIPPED)) == []
