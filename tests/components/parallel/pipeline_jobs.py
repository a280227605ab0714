"""Jobs on pipeline ranks, one after the other in the same processes, and what each of them computed."""

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, meeting_point

COMMON = (
    "--model.flavor=deep",
    "--training.seq_len=16",
    "--training.global_batch_size=8",
    "--training.local_batch_size=4",
    "--training.steps=2",
    "--data.document_mask",
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=12",
    "--validation.local_batch_size=2",
    "--validation.global_batch_size=4",
    "--validation.steps=1",
    "--validation.freq=2",
)
"""Two pipeline steps for each optimizer step, documents apart; validation has a length of its own."""


@dataclass
class Computed:
    """What a job computed, on one rank or put together from all."""

    steps: list[tuple[float, float, float, int]] = field(default_factory=list)
    """Loss, max_loss, grad_norm, tokens of each step."""
    validation: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, before clipping."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Of the parameters, after the last step."""
    schedules: list[tuple[str, int]] = field(default_factory=list)
    """torch's class, and the microbatches that it runs; of the first rank."""


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _trained(argv: list[str]) -> Computed:
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    found = Computed()

    class Watching(Trainer):
        def update(self, rows: Any, facts: Any) -> Any:
            if self.progress.step == 1:
                named = [pair for model in self.models for pair in model.named_parameters()]
                found.gradients = {name: _whole(p.grad) for name, p in named if p.grad is not None}
            return super().update(rows, facts)

        def finish_step(self, values: Any, last: bool) -> None:
            super().finish_step(values, last)
            loss, largest, norm = map(float, values)
            found.steps.append((loss, largest, norm, self.progress.tokens))

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Watching(resolved, os.environ)
    trainer.train()
    found.values = {name: _whole(p) for model in trainer.models for name, p in model.named_parameters()}
    if trainer.validator:
        loss = trainer.validator.validate(0)
        assert isinstance(loss, float)  # of the only set
        found.validation = loss
    schedules = trainer.pipeline._schedules.values() if trainer.pipeline else ()
    found.schedules = [(type(schedule).__name__, schedule._n_microbatches) for schedule in schedules]
    trainer.close()
    return found


def _in_turn(jobs: list[tuple[list[str], dict[str, str]]]) -> list[Computed]:
    gc.freeze()
    found = []
    for argv, environ in jobs:
        os.environ.update(environ)  # a port for each job: the one before may still be closing
        found.append(_trained(argv))
    return found


def run(ranks: int, folder: Path, jobs: Mapping[str, tuple[str, ...]], timeout: float = 200) -> dict[str, Computed]:
    """Run the jobs, each `COMMON` with these arguments on top; what each computed, put together from its ranks.

    Ranks that hold the same parameter must agree on it, and all ranks on the numbers of the steps.
    """
    argvs = [
        ([*TINY, *COMMON, f"--job.dump_folder={folder}/{ranks}-{name}", *job], meeting_point())
        for name, job in jobs.items()
    ]
    told = run_ranks(ranks, _in_turn, argvs, backend=None, timeout=timeout)
    return {name: _joined([rank[n] for rank in told]) for n, name in enumerate(jobs)}


def _joined(ranks: list[Computed]) -> Computed:
    joined = Computed(ranks[0].steps, ranks[0].validation, schedules=ranks[0].schedules)
    for rank in ranks:
        assert (rank.steps, rank.validation) == (joined.steps, joined.validation)
        for mine, all_ in ((rank.gradients, joined.gradients), (rank.values, joined.values)):
            for name, value in mine.items():
                assert torch.equal(all_.setdefault(name, value), value), name
    return joined


def same(got: Computed, want: Computed, tolerance: float = 1e-5) -> None:
    """Assert that both computed the same."""
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine[3] == theirs[3]
        for a, b in zip(mine, theirs, strict=True):
            assert abs(a - b) <= tolerance * abs(b), (mine, theirs)
    assert abs(got.validation - want.validation) <= tolerance * want.validation
    assert got.gradients.keys() == want.gradients.keys() == want.values.keys() == got.values.keys()
    norm = torch.stack([g.norm() for g in want.gradients.values()]).norm()
    for name, gradient in want.gradients.items():
        apart = (got.gradients[name] - gradient).norm()
        assert apart <= tolerance * max(gradient.norm(), 1e-3 * norm), (name, apart, gradient.norm())
        assert (got.values[name] - want.values[name]).norm() <= tolerance * want.values[name].norm(), name
