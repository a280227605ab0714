"""A layout on real ranks: the Trainer as it is, but for writing down what it computes."""

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tests.layouts.facts import Facts, Piece, Pieces, Step, Told, assemble
from tests.layouts.layout import Layout
from tests.layouts.mutants import planted
from tests.ranks import run_ranks
from tests.trainer.runs import meeting_point

if TYPE_CHECKING:
    from components.data.loader import StepRows
    from components.metrics.meter import StepValues
    from trainer.trainer import StepFacts


def run(layout: Layout, folder: Path, aliases: dict[str, str], mutant: str = "", timeout: float = 120) -> Facts:
    """Train a layout on its ranks, with a defect planted if asked, and put together what they hold.

    Raises RankError if a rank fails.
    """
    argv = [*layout.arguments(), f"--job.dump_folder={folder}"]
    told = run_ranks(
        layout.processes, record, argv, meeting_point(), mutant, layout.ranks, backend=None, timeout=timeout
    )
    return assemble([of_rank for of_process in told for of_rank in of_process], aliases)


def record(argv: list[str], environ: dict[str, str], mutant: str, ranks: int) -> list[Told]:
    """One process: train, and tell of each rank that is in it."""
    from components.runtime import distributed
    from trainer.command import import_custom, trainer_class, validate_job
    from trainer.config.load import load_job

    os.environ.update(environ)
    gc.unfreeze = lambda: None  # a Trainer begins with a collection; what the fork server brought need not be in it
    distributed.RETRY_SECONDS = 0.02

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    validate_job(resolved, ranks)
    base: Any = trainer_class(resolved)

    class Recording(base):
        """Writes down, changes nothing."""

        validation = float("nan")

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.recorded: list[Step] = []
            self.gradients: dict[str, list[Piece]] = {}
            validator = self.validator
            if validator is not None:
                validate = validator.validate
                validator.validate = lambda step: self.validated(validate(step))

        def validated(self, loss: float) -> float:
            self.validation = loss
            return loss

        def state(self) -> dict[str, list[Piece]]:
            return {
                name: _pieces(value)
                for model in self.models
                for name, value in (*model.named_parameters(), *model.named_buffers())
            }

        def update(self, rows: "StepRows", facts: "StepFacts") -> "StepValues | None":
            if self.progress.step == 1:
                named = [pair for model in self.models for pair in model.named_parameters()]
                self.gradients = {name: _pieces(p.grad) for name, p in named if p.grad is not None}
            return super().update(rows, facts)

        def finish_step(self, values: "StepValues", last: bool) -> None:
            super().finish_step(values, last)
            loss, max_loss, norm = (float(value) for value in values)
            self.recorded.append(Step(loss, max_loss, norm, self.progress.tokens))

    with planted(mutant):
        trainer = Recording(resolved, {**os.environ, "NGPU": str(ranks)})
        before = trainer.state()
        trainer.train()
    after = trainer.state()
    updates = {
        name: [replace(new, values=new.values - old.values) for new, old in zip(pieces, before[name], strict=True)]
        for name, pieces in after.items()
    }
    if dist.is_initialized():
        dist.barrier()  # the store's rank ends last
    return [
        Told(trainer.recorded, trainer.validation, _of(trainer.gradients, place), _of(updates, place))
        for place in range(len(next(iter(updates.values()))))
    ]


def _of(pieces: dict[str, list[Piece]], place: int) -> Pieces:
    return {name: each[place] for name, each in pieces.items()}


def _pieces(value: Tensor) -> list[Piece]:
    """The parts of a tensor of the ranks in this process, copied to the host."""
    from components.mesh.counter import local_dims

    local = (value.to_local() if isinstance(value, DTensor) else value).detach()
    if (of_ranks := getattr(local, "_local_tensors", None)) is not None:  # torch's LocalTensor
        from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

        shape = tuple(map(int, value.shape))
        with maybe_disable_local_tensor_mode():  # under which every new tensor is one of all ranks
            return [Piece(shape, _places(value, rank), x.float().clone()) for rank, x in of_ranks.items()]
    places = [dim.cpu() for dim in local_dims(value)]
    return [Piece(tuple(value.shape), places, local.float().cpu().clone())]


def _places(value: Tensor, rank: int) -> list[Tensor]:
    """Which elements along each dimension a rank has of an evenly cut tensor."""
    dims = [torch.arange(int(size)) for size in value.shape]
    if isinstance(value, DTensor):  # over one dimension, tp or etp, whose ranks are neighbours
        (placement,), size = value.placements, value.device_mesh.size()
        if isinstance(placement, Shard):
            dims[placement.dim] = dims[placement.dim].chunk(size)[rank % size]
    return dims
