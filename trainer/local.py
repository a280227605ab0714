"""`COMM_MODE=local_tensor`: all ranks of a job in one process, with real numbers, to look at a layout with a debugger.

Everything is the Trainer's; the process group is fake, and torch's LocalTensorMode does what each rank would do, one
after the other, and what collectives would do between them. Rows come from outside of it, the same for all ranks;
losses leave it as plain tensors. It carries tensor, sequence and context parallelism; what it cannot, `check` refuses
(`trainer.config.validate`). Far slower than ranks of their own.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, cast

from torch.distributed._local_tensor import (  # the mode has no public home yet
    LocalTensor,
    LocalTensorMode,
    maybe_disable_local_tensor_mode,
)

from components.layers.initialize import initialize
from components.mesh.batch import Batch, RowLoss
from components.mesh.degrees import resolve_degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.one_process import spread
from components.parallel.pipeline import Stage
from components.runtime import distributed
from components.runtime.logging import logger
from trainer.build import DTYPES, Model, build_on_meta, materialize, zero_buffers
from trainer.command import world_size
from trainer.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from components.config.job_config import JobConfig
    from components.data.loader import StepRows
    from components.metrics.meter import StepValues
    from trainer.config.load import ResolvedJob


class LocalTrainer(Trainer):
    """Trains as all ranks, whose number NGPU × NNODES says, in one process."""

    def __init__(self, resolved: ResolvedJob, environ: MutableMapping[str, str]) -> None:
        self.ranks = world_size(resolved, environ)
        self.mode = LocalTensorMode(self.ranks)
        super().__init__(resolved, environ)

    def build_mesh(self, job: JobConfig) -> ParallelDims:
        """The mesh of ranks that are all here."""
        self.dtype = DTYPES[job.training.dtype]  # casting to another type for compute is FSDP2's
        distributed.init_fake(self.ranks)
        with self.mode:
            return ParallelDims.build(resolve_degrees(job.parallelism, self.ranks), self.device.type)

    def build_stages(self) -> list[Stage]:
        """The whole model with its values, then laid out: ranks without a place cannot fill pieces by their place."""
        model = build_on_meta(self.spec, self.args, self.job)
        materialize(model, self.device)
        zero_buffers(model, self.device)
        initialize(model, cast(Model, model).inits(), self.seed)
        config = self.job.parallelism
        if config.context_parallel_degree > 1 and config.context_parallel_rotate_method == "alltoall":
            logger.info("note: who sends to whom cannot be said for all ranks at once: keys are gathered, not rotated")
        with self.mode:
            self.spec.parallelize_fn(model, self.dims, self.job, self.dtype)
        return [Stage(0, 1, model)]

    def train_step(self, rows: StepRows) -> StepValues | None:
        """A step of all ranks."""
        with self.mode:
            return super().train_step(rows)

    def look_ahead(self, batch: Batch) -> Batch:
        """Of rows that are still the same for all ranks: in the mode the new tensors would be spread already."""
        with maybe_disable_local_tensor_mode():
            return super().look_ahead(batch)

    def split(self, batch: Batch) -> Batch:
        """Each rank's part of each row."""
        return super().split(batch.map(lambda tensor: spread(tensor, self.mode)))

    def evaluate(self, batch: Batch) -> RowLoss:
        """The losses of whole rows, on which all ranks agree."""
        with self.mode:
            return RowLoss(*(_agreed(values) for values in super().evaluate(batch)))


def _agreed(values: Tensor) -> Tensor:
    return values.reconcile() if isinstance(values, LocalTensor) else values
