"""The Trainer: one job on one process, from a resolved config to its last step.

`__init__` builds the parts in the order of the house's plan, one named step each; `train` and `train_step` are the
loop. A new idea replaces a builder in its family's TrainSpec, or subclasses one method here; nothing needs a copy of
the loop."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, MutableMapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from components.checkpoint.fingerprint import JobIdentity, fingerprint_of
from components.checkpoint.saver import SaveResult
from components.data.loader import Loader, StepRows
from components.loss.ahead import AheadLoss, look_ahead
from components.mesh.batch import IGNORE, Batch, RowLoss
from components.mesh.degrees import resolve_degrees
from components.mesh.parallel_dims import ParallelDims
from components.metrics.flops import peak_flops
from components.metrics.meter import Meter, StepValues, largest_row_mean, reduce_step
from components.metrics.profiler import Profiler
from components.metrics.step import Validated
from components.optim.clip import gradient_norm, scale_gradients
from components.optim.early import EarlyStep
from components.parallel.context import split_sequence
from components.parallel.data import needs_process_group, set_gradient_sync
from components.parallel.pipeline import Stage
from components.runtime import distributed, logging, seeds, witness
from components.runtime.collect import GarbageCollector
from components.runtime.device import compute_dtype, mark, pick_device
from components.runtime.errors import DataError, SaveError
from components.runtime.gate import Gate
from components.runtime.logging import logger
from components.runtime.paths import prepare_folder
from components.runtime.provenance import git_revision
from components.runtime.world import World
from models.train_spec import families, get_args
from trainer.bad_steps import BadSteps
from trainer.build import DTYPES, Model, build_pipeline, build_stages
from trainer.compare import compare_ranks
from trainer.config.output import to_toml
from trainer.parts import Parts, Progress
from trainer.persistence import Persistence
from trainer.report import describe_job, save_run, tell_data
from trainer.settle import settle, sizes
from trainer.validator import Validator

if TYPE_CHECKING:
    from components.config.job_config import JobConfig
    from components.config.training import Validation
    from trainer.config.load import ResolvedJob


class StepFacts(NamedTuple):
    """What a step has come to before the weights move."""

    values: StepValues
    """Reported; equal on all ranks."""
    count: int
    """Valid labels of the global batch."""
    norm: Tensor
    """Norm of the gradients of the whole model, 0-d."""
    local_sums: Tensor
    """Sums of this rank's rows' losses. # (rows,)"""


class Trainer:
    """Builds the parts of one job and trains it. All ranks do the same; those of LOG_RANK report."""

    def __init__(self, resolved: ResolvedJob, environ: MutableMapping[str, str]) -> None:
        job = resolved.job
        # where it runs
        self.world = World.from_environ(environ)
        logging.configure(self.world, environ.get("LOG_RANK") or "0")
        self.device = pick_device(self.world)
        self.dtype = compute_dtype(job.training.mixed_precision_param, self.device)
        self.seed = seeds.set_determinism(job.debug)
        self.dims = self.build_mesh(job)
        self.dump_folder = prepare_folder(job.job.dump_folder)
        self.standing = witness.standing()
        # what it is
        self.spec = families[job.model.name].load()
        self.args = get_args(job.model.name, job.model.flavor)
        self.persistence = Persistence(job, self.spec.state_dict_adapter, self.spec.args_for_job_fn(self.args, job))
        self.job, notes = settle(job, self.dims.data_degree, self.persistence.saved_sizes)
        self.identity = self.identify(resolved)
        # what it reads
        self.tokenizer = self.spec.build_tokenizer_fn(self.job)
        self.loader = self.build_loader()
        # what learns, and how
        stages = self.build_stages()
        self.models = [stage.module for stage in stages]
        self.parameters = [parameter for model in self.models for parameter in model.parameters()]
        self.loss_fn = AheadLoss(self.spec.build_loss_fn(self.job), self.job.loss.mtp_coefficient)
        self.pipeline = build_pipeline(stages, self.job, self.dims, self.device, self.dtype, self.loss_fn)
        self.optimizers = self.spec.build_optimizers_fn(self.models, self.job, self.device)
        self.schedule = self.spec.build_lr_schedulers_fn(self.optimizers, self.job)
        late = self.pipeline.tied.held if self.pipeline else []
        self.early = EarlyStep(self.optimizers, late) if job.optimizer.early_step_in_backward else None
        # where it stands
        tied = self.pipeline.tied.pairs if self.pipeline else []
        place = (self.dims.data_rank, self.dims.data_degree)
        self.parts = Parts(self.models, self.optimizers, self.loader, *place, tied, self.device)
        self.standing.phase = "load"
        self.progress = self.persistence.load(self.parts, self.identity)
        self.standing.phase = "start-up"
        self.gate = Gate()
        self.settle(replace(self.progress, generators=seeds.generator_state(self.device)))
        self.bad_steps = BadSteps(self)
        self.validator = (self.spec.build_validator_fn or Validator)(self) if job.validation.enable else None
        # what it tells
        start = self.progress.step
        self.first_step = start + 1
        self.sinks = self.spec.build_metrics_processor_fn(self.job, self.world, start or None)
        self.meter = self.build_meter()
        self.reporting = threading.RLock()
        self.profiler = Profiler(self.job.profiling, self.dump_folder, self.world.rank, self.device, start)
        self.collector = GarbageCollector(self.job.training.gc_freq, self.job.training.gc_debug)
        save_run(self, resolved)
        describe_job(self, [*resolved.notes, *notes])

    def build_mesh(self, job: JobConfig) -> ParallelDims:
        """The mesh of the job's degrees, and the process groups that it needs."""
        degrees = resolve_degrees(job.parallelism, self.world.size)
        stored = DTYPES[job.training.dtype]
        if needs_process_group(degrees, stored, self.dtype, job.training.enable_cpu_offload):
            distributed.init_process_group(self.world, self.device, job.comm, job.job.dump_folder)
        return ParallelDims.build(degrees, self.device.type)

    def identify(self, resolved: ResolvedJob) -> JobIdentity:
        """Whose checkpoints these are."""
        derived = {
            "training.global_batch_size": self.job.training.global_batch_size,
            "training.mixed_precision_param": str(self.dtype).removeprefix("torch."),
            "debug.seed": self.seed,
        }
        local = self.job.training.local_batch_size
        how = {"local_batch_size": local, "device": self.device.type}
        layout = {**asdict(self.dims.degrees), **how, "sizes": sizes(self.job)}
        return JobIdentity(fingerprint_of(self.job, derived), layout, to_toml(resolved.job), git_revision())

    def build_stages(self) -> list[Stage]:
        """This rank's stages of the model, laid out and with their first values."""
        return build_stages(self.spec, self.args, self.job, self.dims, self.device, self.dtype, self.seed)

    def build_loader(self, validation: Validation | None = None) -> Loader:
        """This rank's rows for training, or for that validation."""
        return self.spec.build_dataloader_fn(
            self.job if validation is None else replace(self.job, validation=validation),
            tokenizer=self.tokenizer,
            vocab_size=self.args.vocab_size,
            data_rank=self.dims.data_rank,
            data_degree=self.dims.data_degree,
            validation=validation is not None,
        )

    def build_meter(self) -> Meter:
        """Counters that go on from the tokens seen before."""
        return Meter(
            flops_per_token=self.spec.args_for_job_fn(self.args, self.job).flops_per_token(self.job.training.seq_len),
            ranks=self.world.size,
            peak=peak_flops(self.device, self.dtype, self.job.metrics.peak_tflops),
            device=self.device,
            tokens=self.progress.tokens,
        )

    def train(self) -> None:
        """Train to `training.steps`, or to the end of the data.

        Raises NonFiniteError, SpikeError, DataError, SaveError.
        """
        steps, start = self.job.training.steps, self.progress.step
        if self.job.checkpoint.create_seed_checkpoint:
            self.persistence.save_seed(self.parts, self.identity)
            return
        self.persistence.export_missed(last=start >= steps)
        if start >= steps:
            logger.info("nothing to do: step %d of training.steps = %d is done", start, steps)
            return
        with self.profiler, self.persistence.saver.unbroken():
            self.meter.start()
            while self.train_on():
                pass
        if self.progress.step < steps:
            if self.progress.step == start:
                self.persistence.export_missed(last=True)
            self.explain_end(start)

    def train_on(self) -> bool:
        """Train from where the job stands. True: it has gone back to a checkpoint, to be trained on from there."""
        with closing(self.steps()) as source:
            for rows, is_last in source:
                self.progress.step += 1
                self.standing.step = self.progress.step
                passed = self.bad_steps.passes_over(self.progress.step)
                values = self.pass_over(rows) if passed else self.train_step(rows)
                if values is None:
                    return True
                last = is_last or self.progress.step == self.job.training.steps
                self.finish_step(values, last)
                if last:
                    break
        return False

    def steps(self) -> Generator[tuple[StepRows, bool], None, None]:
        """This rank's rows, step by step, and whether they are the last. The time spent waiting for them is counted.

        Only data that can end are looked at one step ahead.
        """
        with closing(self.loader.steps(self.dims.group("batch"), self.device)) as source:
            ends = self.loader.ends
            ahead = self.next_rows(source) if ends else None
            while rows := ahead if ends else self.next_rows(source):
                ahead = self.next_rows(source) if ends else None
                yield rows, ends and ahead is None

    def next_rows(self, source: Iterator[StepRows]) -> StepRows | None:
        """The next step's rows; None at the end of the data."""
        self.standing.step, self.standing.phase = self.progress.step + 1, "data"
        with self.meter.waiting():
            return next(source, None)

    def explain_end(self, start: int) -> None:
        """Say that the data ended early. Raises DataError if a new job could not do a single step."""
        step = self.progress.step
        if not step:
            raise DataError(
                f"the data end before a global batch of {self.job.training.global_batch_size} rows is full:"
                ' lower training.global_batch_size, or go around again with data.on_end = "repeat"'
            )
        nothing = "nothing to do: " if step == start else ""
        logger.info("%sthe data ended after step %d of %d", nothing, step, self.job.training.steps)

    def train_step(self, rows: StepRows) -> StepValues | None:
        """One optimizer step: gradients of the global batch's mean loss, clipped, applied if they may be.

        None: the job has gone back to a checkpoint instead.
        """
        if self.early:  # weights move in backward
            with self.gate.section():
                return self.update(rows, self.compute(rows))
        facts = self.compute(rows)
        with self.gate.section():
            return self.update(rows, facts)

    def compute(self, rows: StepRows) -> StepFacts:
        """The gradients of a step, and what is known of it on all ranks."""
        self.standing.phase = "forward/backward"
        self.schedule.apply(self.progress.step - self.progress.schedule_start)
        local, valid = self.accumulate(rows.batch.to(self.device))
        compare_ranks(self)
        total = reduce_step(local.sums.sum(), local.counts.sum(), largest_row_mean(local), self.dims.group("batch"))
        norm = self.global_norm()
        facts = torch.stack([total.loss_sum / valid, total.max_loss, norm, total.count])  # float64, exact for counts
        loss, max_loss, grad_norm, count = facts.tolist()
        return StepFacts(StepValues(loss, max_loss, grad_norm), int(count), norm, local.sums)

    def update(self, rows: StepRows, facts: StepFacts) -> StepValues | None:
        """Apply the gradients if they may be, and count the step; None: gone back to a checkpoint (`BadSteps`)."""
        self.standing.phase = "optimizer"
        verdict, count = self.bad_steps.accept(facts), facts.count
        if verdict.kind == "ok":
            scale_gradients(self.parameters, facts.norm, self.job.training.max_norm)
            self.optimizers.step()
        elif self.bad_steps.handle(verdict, facts):
            return None
        else:
            count = 0
        self.settle_step(rows, facts.values, count, computed=rows.batch.labels.numel() * self.dims.data_degree)
        return facts.values

    def pass_over(self, rows: StepRows) -> StepValues:
        """Count a step whose rows are read and dropped."""
        self.schedule.apply(self.progress.step - self.progress.schedule_start)
        with self.gate.section():
            values = self.bad_steps.pass_over()
            self.settle_step(rows, None, 0, computed=0)
        if self.progress.step == self.first_step:
            self.first_step += 1  # the first that takes long is yet to come
        return values

    def settle_step(self, rows: StepRows, values: StepValues | None, count: int, computed: int) -> None:
        """A step is done, with so many labels trained on: its progress is now that of the weights."""
        self.optimizers.zero_grad()
        self.meter.add(count, computed)
        self.progress.tokens = self.meter.tokens
        drawn = seeds.generator_state(self.device)
        self.settle(replace(self.progress, cursors=rows.cursors, generators=drawn))
        self.unreported = (self.progress.step, values, self.optimizers.lr)

    def settle(self, progress: Progress) -> None:
        """This is what the weights are the result of, once the device has come to here."""
        self.settled, self.settled_event = progress, mark(self.device)
        self.unreported: tuple[int, StepValues | None, float] | None = None

    def resettle(self, progress: Progress) -> None:
        """All parts have gone back to where they were at `progress`: so do the counters and the reports."""
        self.optimizers.zero_grad()
        self.progress = progress
        self.settle(replace(progress, generators=seeds.generator_state(self.device)))
        self.meter.tokens = progress.tokens
        self.sinks.rewind(progress.step)
        self.profiler.rewind(progress.step)

    def global_norm(self) -> Tensor:
        """The norm of the gradients of the whole model, 0-d."""
        group, copies = self.dims.group("pp"), self.pipeline.tied.copies if self.pipeline else set()
        if self.early:
            return self.early.finish(group, copies, self.device)
        counted = [parameter for parameter in self.parameters if parameter not in copies]
        return gradient_norm(counted, group, self.device)

    def accumulate(self, batch: Batch) -> tuple[RowLoss, Tensor]:
        """Gradients of this rank's rows, and the rows' losses; the divisor is the valid labels of the global batch."""
        batch = self.split(self.look_ahead(batch))
        valid = distributed.all_reduce_sum((batch.labels != IGNORE).sum(), self.dims.group("loss")).clamp(min=1)
        results: list[RowLoss] = []
        pieces = self.microbatches(batch, self.job.training.local_batch_size)
        for index, piece in enumerate(pieces):
            results.append(self.forward_backward(piece, valid, last=index == len(pieces) - 1))
        if self.pipeline:
            self.pipeline.tied.sum_gradients()
        local = RowLoss(torch.cat([r.sums for r in results]), torch.cat([r.counts for r in results]))
        return self.whole_rows(local), valid

    def look_ahead(self, batch: Batch) -> Batch:
        """The same rows, with what multi-token prediction needs of them where the model has it."""
        depth = getattr(self.spec.args_for_job_fn(self.args, self.job), "mtp_layers", 0)
        return look_ahead(batch, depth, not self.job.data.cross_document_labels) if depth else batch

    def split(self, batch: Batch) -> Batch:
        """This rank's part of each of its rows."""
        return split_sequence(batch, self.dims.axis("cp"), self.job.parallelism)

    def forward_backward(self, batch: Batch, valid: Tensor, last: bool) -> RowLoss:
        """Adds the gradients of one microbatch. `last` of the step: replicas may then add up theirs."""
        for model in self.models:
            set_gradient_sync(model, last)
        if self.early:
            self.early.arm(last)
        if self.pipeline:
            return self.pipeline.train(batch, self.inputs(batch, valid), valid)
        result = self.forward(batch, valid)
        (result.sums.sum() / valid).backward()
        return RowLoss(result.sums.detach(), result.counts)

    def whole_rows(self, local: RowLoss) -> RowLoss:
        """The losses of whole rows, from those of their parts and of the stages, of which only the last has any."""
        for name in ("cp", "pp"):
            for values in local:
                distributed.all_reduce_sum(values, self.dims.group(name))
        return local

    def microbatches(self, batch: Batch, size: int) -> list[Batch]:
        """The rank's rows of a step, cut in order; the last piece may be smaller."""
        return [batch.slice(start, start + size) for start in range(0, batch.rows, size)]

    def forward(self, batch: Batch, valid: Tensor | None = None) -> RowLoss:
        """Rows → sums of losses and counts of labels: the one forward path of training and validation.

        A pipeline calls the stages and the loss itself."""
        model = cast(Model, self.models[-1])
        hidden = model(batch.tokens, **self.inputs(batch, valid))
        return self.loss_fn(hidden, model.output, batch)

    def inputs(self, batch: Batch, valid: Tensor | None) -> dict[str, Tensor]:
        """What the model reads of each token besides its id (`TrainSpec.inputs`)."""
        found = {"positions": batch.positions}
        if self.job.data.document_mask:
            found["document_ids"] = batch.document_ids
        if valid is not None:
            found["shares"] = (batch.labels != IGNORE) / valid
            if batch.ahead_tokens is not None and batch.ahead_labels is not None:
                found |= {"ahead": batch.ahead_tokens, "ahead_shares": (batch.ahead_labels != IGNORE) / valid}
        return {name: value for name, value in found.items() if name in self.spec.inputs}

    def evaluate(self, batch: Batch) -> RowLoss:
        """The losses of whole rows, without gradients."""
        batch = self.split(batch.to(self.device))
        if self.pipeline:
            return self.whole_rows(self.pipeline.evaluate(batch, self.inputs(batch, None)))
        return self.whole_rows(self.forward(batch))

    def finish_step(self, values: StepValues, last: bool) -> None:
        """What follows a step: validation, report, checkpoint, profile, garbage."""
        step, job = self.progress.step, self.job
        validation = None
        if self.validator and (last or step % job.validation.freq == 0):
            self.standing.phase = "validation"
            with self.meter.pause(), seeds.undisturbed(self.device):
                validation = self.validator.validate(step)
        if last or self.reports(step) or validation is not None:
            self.report(validation)
        self.sinks.advance(step)
        with self.meter.pause():
            self.save(last)
        if step == self.first_step and dist.is_initialized():
            distributed.set_timeout(job.comm.train_timeout_seconds)
        self.profiler.step()
        self.collector.run(step)

    def reports(self, step: int) -> bool:
        """Whether this step is one of those that are reported."""
        return step in (1, self.job.training.steps) or step % self.job.metrics.log_freq == 0

    def report(self, validation: float | Validated | None = None) -> None:
        """Report the last step, once: a stop reports it if it comes before the training thread does."""
        with self.reporting:
            facts, self.unreported = self.unreported, None
            if facts:
                self.sinks.log(self.meter.report(*facts, validation))

    def save(self, last: bool) -> None:
        """Save and export what this step is due for. Raises SaveError if the last step's save fails, or too many
        in a row."""
        step, persistence = self.progress.step, self.persistence
        if persistence.is_due(step, last) or persistence.export_is_due(step, last):
            self.standing.phase = "save"
            with self.gate.section():
                persistence.save_due(self.settled, self.parts, self.identity, last=last)
        try:
            results = persistence.finish() if last else persistence.poll()
        except SaveError:
            self.note_saves(persistence.saver.untold)
            raise
        self.note_saves(results)
        if last and (errors := [result.error for result in results if result.step == step and result.error]):
            raise SaveError(errors[-1])

    def note_saves(self, results: Sequence[SaveResult]) -> None:
        """Record saves that have ended."""
        for result in results:
            cost = {"seconds": result.seconds, "stall_seconds": result.stall, "bytes": result.bytes}
            if result.error:
                self.sinks.note({"event": "save_failed", "step": result.step, "reason": result.error, **cost})
            elif result.bytes:
                self.sinks.note({"event": "saved", "step": result.step, "kind": result.kind, **cost})

    def close(self) -> None:
        """Flush what is reported, end worker processes and process groups. Collective."""
        self.standing.phase = "end"
        tell_data(self)
        self.sinks.close()
        self.collector.close()
        if self.validator:
            self.validator.close()
        distributed.destroy()
