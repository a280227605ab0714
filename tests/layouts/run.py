"""A layout on real ranks: the Trainer as it is, but for writing down what it computes."""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.layouts.facts import Facts, Piece, Pieces, Step, Told, assemble
from tests.layouts.layout import Layout
from tests.layouts.mutants import planted
from tests.ranks import run_ranks
from tests.trainer.runs import meeting_point

if TYPE_CHECKING:
    from components.data.loader import StepRows
    from components.metrics.meter import StepValues


def run(layout: Layout, folder: Path, aliases: dict[str, str], mutant: str = "", timeout: float = 120) -> Facts:
    """Train a layout on its ranks, with a defect planted if asked, and put together what they hold.

    Raises RankError if a rank fails.
    """
    argv = [*layout.arguments(), f"--job.dump_folder={folder}"]
    told = run_ranks(layout.ranks, record, argv, meeting_point(), mutant, backend=None, timeout=timeout)
    return assemble(told, aliases)


def record(argv: list[str], environ: dict[str, str], mutant: str) -> Told:
    """One rank: train, and tell."""
    from components.runtime import distributed
    from trainer.command import import_custom, validate_job
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    os.environ.update(environ)
    gc.unfreeze = lambda: None  # a Trainer begins with a collection; what the fork server brought need not be in it
    distributed.RETRY_SECONDS = 0.02

    class Recording(Trainer):
        """Writes down, changes nothing."""

        validation = float("nan")

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.recorded: list[Step] = []
            self.gradients: Pieces = {}
            validator = self.validator
            if validator is not None:
                validate = validator.validate
                validator.validate = lambda step: self.validated(validate(step))

        def validated(self, loss: float) -> float:
            self.validation = loss
            return loss

        def state(self) -> dict[str, Piece]:
            return {
                name: _piece(value)
                for model in self.models
                for name, value in (*model.named_parameters(), *model.named_buffers())
            }

        def accept(self, loss: float, grad_norm: float, local_sums: Tensor) -> bool:
            if self.progress.step == 1:
                named = [pair for model in self.models for pair in model.named_parameters()]
                self.gradients = {name: _piece(p.grad) for name, p in named if p.grad is not None}
            return super().accept(loss, grad_norm, local_sums)

        def finish_step(self, values: "StepValues", rows: "StepRows", last: bool) -> None:
            super().finish_step(values, rows, last)
            loss, max_loss, norm = (float(value) for value in values)
            self.recorded.append(Step(loss, max_loss, norm, self.progress.tokens))

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    validate_job(resolved, int(os.environ["WORLD_SIZE"]))
    with planted(mutant):
        trainer = Recording(resolved, os.environ)
        before = trainer.state()
        trainer.train()
    after = trainer.state()
    updates = {name: Piece(x.shape, x.places, x.values - before[name].values) for name, x in after.items()}
    if dist.is_initialized():
        dist.barrier()  # the store's rank ends last
    return Told(trainer.recorded, trainer.validation, trainer.gradients, updates)


def _piece(value: Tensor) -> Piece:
    """This rank's part of a tensor, copied to the host."""
    from components.mesh.counter import local_dims

    local = value.to_local() if isinstance(value, DTensor) else value
    places = [dim.cpu() for dim in local_dims(value)]
    return Piece(tuple(value.shape), places, local.detach().float().cpu().clone())
