"""The dry run: one rank's first step of a job on any number of ranks, in one process, without a GPU, data or tokenizer.

The process group is fake and so are the tensors (shapes without memory), but mesh, sharding, model, loss, optimizer and
the step are the real ones, by the same calls as the Trainer's. Whatever a real run would refuse is refused here.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from components.config.compute import Compile
from components.estimate.footprint import Footprint, footprint
from components.loss.ahead import AheadLoss
from components.mesh.batch import Batch
from components.mesh.degrees import Degrees, resolve_degrees
from components.mesh.parallel_dims import ParallelDims
from components.optim.clip import scale_gradients
from components.optim.early import EarlyStep
from components.parallel.pipeline import Stage
from components.runtime import distributed
from components.runtime.device import compute_dtype
from models.train_spec import families, get_args
from trainer.build import build_pipeline, fill, lay_out
from trainer.settle import settle
from trainer.trainer import Trainer

if TYPE_CHECKING:
    from components.config.job_config import JobConfig

DEVICE = torch.device("cpu")  # a fake accelerator aborts the process in backward where torch was built without it


class DryTrainer(Trainer):
    """The Trainer's forward and backward over fake tensors, for one rank of many.

    Made outside of FakeTensorMode, where the layout is found: sharding slices lists as long as the mesh, which real
    meta tensors do ten times faster, and meshes look their coordinates up in tensors. `step` goes inside.
    """

    def __init__(self, job: JobConfig, dims: ParallelDims) -> None:
        self.device, self.dims = DEVICE, dims
        job, self.notes = settle(job, dims.data_degree, {})
        eager = replace(job.parallelism, enable_async_tensor_parallel=False)
        # a compiler wants real tensors, and changes nothing that is held
        self.job = replace(job, compile=Compile(), parallelism=eager)
        self.dtype = compute_dtype(job.training.mixed_precision_param, DEVICE, dry_run=True)
        self.spec = families[job.model.name].load()
        self.args = get_args(job.model.name, job.model.flavor)
        self.stages = lay_out(self.spec, self.args, self.job, dims, self.dtype)
        self.models = [stage.module for stage in self.stages]
        self.loss_fn = AheadLoss(self.spec.build_loss_fn(self.job), self.job.loss.mtp_coefficient)
        self.pipeline = build_pipeline(self.stages, self.job, dims, DEVICE, self.dtype, self.loss_fn)

    def microbatches(self, batch: Batch, size: int) -> list[Batch]:
        """The first and the last: what is accumulated in between takes time and no more memory."""
        pieces = super().microbatches(batch, size)
        return pieces if len(pieces) < 3 else [pieces[0], pieces[-1]]

    def step(self) -> Footprint:
        """One step on rows without content, in fake memory; what the rank then holds."""
        fill(self.stages, self.job, DEVICE, seed=0)
        self.parameters = [parameter for model in self.models for parameter in model.parameters()]
        self.optimizers = self.spec.build_optimizers_fn(self.models, self.job, DEVICE)
        late = self.pipeline.tied.held if self.pipeline else []
        self.early = EarlyStep(self.optimizers, late) if self.job.optimizer.early_step_in_backward else None
        rows = self.job.training.global_batch_size // self.dims.data_degree
        blank = torch.zeros(rows, self.job.training.seq_len, dtype=torch.int64)
        self.accumulate(Batch(blank, blank, blank, blank))
        scale_gradients(self.parameters, self.global_norm(), self.job.training.max_norm)
        self.optimizers.step()
        return footprint(self.models, self.optimizers.named_state().values())


def dry_run(job: JobConfig, notes: list[str], ranks: int) -> int:
    """Print what each of `ranks` ranks would hold. Returns the exit code."""
    begin = time.perf_counter()
    distributed.init_fake(ranks, job.comm.fake_rank)
    dims = ParallelDims.build(resolve_degrees(job.parallelism, ranks), DEVICE.type)
    trainer = DryTrainer(job, dims)
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = trainer.step()
    distributed.destroy()
    print(summary(trainer, held, [*notes, *trainer.notes]))
    seconds = time.perf_counter() - begin
    print(f"dry run: one step of rank {job.comm.fake_rank} of {ranks} in {seconds:.1f} s; nothing was trained")
    return 0


def summary(trainer: DryTrainer, held: Footprint, notes: list[str]) -> str:
    """What was found, as text."""
    job, degrees, training = trainer.job, trainer.dims.degrees, trainer.job.training
    batch = training.global_batch_size
    args = trainer.spec.args_for_job_fn(trainer.args, job)
    lines = [
        *(f"note: {note}" for note in notes),
        f"model: {job.model.name} {job.model.flavor}, {args.parameter_count():,} parameters",
        f"layout: {degrees.world} ranks, {degrees}",
        *(f"stage: {_stage(stage)}" for stage in trainer.stages if stage.count > 1),
        f"step: {batch} rows × {training.seq_len} tokens = {batch * training.seq_len:,} tokens,"
        f" {_rows(batch // degrees.batch, job, degrees)},"
        f" {args.flops_per_token(training.seq_len) * batch * training.seq_len:.3e} FLOPs",
        f"precision: stored in {training.dtype}, computed in {str(trainer.dtype).removeprefix('torch.')}",
        "each rank holds" if degrees.pp == 1 else "each rank of this stage holds",
        held.table(),
    ]
    return "\n".join(lines)


def _stage(stage: Stage) -> str:
    """Which stage it is, and the modules that it holds."""
    held = [_span(name, child) for name, child in stage.module.named_children() if [*child.parameters()]]
    return f"{stage.index} of {stage.count}, counted from 0: {', '.join(held)}"


def _span(name: str, module: nn.Module) -> str:
    if not isinstance(module, nn.ModuleDict):
        return name
    numbers = [int(key) for key in module]
    unbroken = numbers == [*range(numbers[0], numbers[-1] + 1)]  # else the user has listed the modules
    return f"{name} {numbers[0]} to {numbers[-1]}" if unbroken else f"{name} {', '.join(map(str, numbers))}"


def _rows(rows: int, job: JobConfig, degrees: Degrees) -> str:
    """A rank's rows of a step, and what it works on at once."""
    one = job.training.local_batch_size if degrees.pp == 1 else job.parallelism.pipeline_parallel_microbatch_size
    return f"{rows} rows on each rank in {-(-rows // one)} microbatches"
