"""Running a pipeline: torch's schedules for training, one plain pass for evaluation.

Shapes at the borders of stages are known before anything runs, so they are given to torch rather than found out by
sending objects around, which a dry run could not do. Every rank reads the rows itself; only hidden states travel.

Evaluation does not use torch's schedules: those of them that go there and back cannot run without a backward. Stage by
stage, all microbatches, is as good where nothing is kept for a backward.

Schedules that split a backward in two halves compute the weights' gradients later, out of what the first half kept.
With recomputation or compiled blocks nothing is kept to split: both halves would compute the block again, once for
each matrix; and where FSDP frees parameters after forward, the second half would not find them and drop their
gradients. There the whole backward happens in place of its first half: the same numbers, and the second half's time is
lost to the schedule.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _PipelineScheduleRuntime,  # what a CSV file needs: it has no public name
    get_schedule_class,
)

from components.config.job_config import JobConfig
from components.mesh.batch import Batch, RowLoss
from components.mesh.parallel_dims import ParallelDims
from components.parallel.pipeline import Stage
from components.parallel.pipeline_schedules import find_schedule, splits_backward
from components.parallel.pipeline_tied import TiedParameters
from components.runtime.errors import MeshError
from components.runtime.logging import logger

Loss = Callable[[Tensor, nn.Module, Batch], RowLoss]
"""(the last stage's output, the last stage's module, rows) → their losses."""


class Pipeline:
    """This rank's stages and how they run. All ranks of the pipeline call the same methods with the same rows."""

    def __init__(
        self,
        stages: Sequence[Stage],
        job: JobConfig,
        dims: ParallelDims,
        device: torch.device,
        dtype: torch.dtype,
        loss: Loss,
    ) -> None:
        """`dtype` is that of hidden states. Raises MeshError without several pipeline ranks."""
        axis = dims.axis("pp")
        if axis is None:
            raise MeshError(
                f"parallelism.pipeline_parallel_degree = {dims.degrees.pp}: a pipeline needs 2 ranks or more"
            )
        self.stages, self.config, self.axis = stages, job.parallelism, axis
        self._parts, self._dtype, self._loss = dims.degrees.tp, dtype, loss
        self._whole_backward = not can_split_backward(job)
        if self._whole_backward and splits_backward(job.parallelism):
            logger.info(
                "note: parallelism.pipeline_parallel_schedule: backwards are not split in two, since blocks are"
                " recomputed, compiled or freed after forward; the bubbles that splitting would fill stay"
            )
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._results: list[RowLoss] = []
        self._valid = torch.ones(())
        self.tied = TiedParameters(stages, axis, device)
        self._fake = dist.get_backend(axis.group) == "fake"

    def train(self, batch: Batch, inputs: dict[str, Tensor], valid: Tensor) -> RowLoss:
        """Add the gradients of these rows' losses, divided by `valid`; their losses, zeros but on the last stage.

        Args:
            batch: `training.local_batch_size` rows.
            inputs: The model's keyword inputs. # (rows, seq) each
            valid: Divisor of the loss.
        """
        depth = 0 if batch.ahead_labels is None else batch.ahead_labels.shape[-1]
        key = (*batch.tokens.shape, depth)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(*key, device=batch.tokens.device)
        self._results, self._valid = [], valid
        tokens = (batch.tokens,) if self.stages[0].first else ()
        target = batch.stacked() if self._last else None
        self._schedules[key].step(*tokens, target=target, return_outputs=False, **inputs)
        return self._collect(batch)

    @torch.no_grad()
    def evaluate(self, batch: Batch, inputs: dict[str, Tensor]) -> RowLoss:
        """The losses of any number of rows, without gradients; zeros but on the last stage.

        A stage asks for all it will receive before it sends: two ranks that send to each other in turns would each
        wait for the other where messages of a pair go in order, as NCCL's do.
        """
        size = self.config.pipeline_parallel_microbatch_size
        pieces = [slice(start, start + size) for start in range(0, batch.rows, size)]
        self._results = []
        kept: list[tuple[Any, Tensor]] = []  # what is sent must stay until it has left
        handed: list[Tensor] = []
        for stage in self.stages:
            rows = [batch.slice(piece.start, piece.stop) for piece in pieces]
            coming = [(None, x) for x in handed] or [self._input(stage, part) for part in rows]
            handed = []
            for part, piece, (arrival, x) in zip(rows, pieces, coming, strict=True):
                if arrival is not None:
                    arrival.wait()
                out = stage.module(x, **{name: value[piece] for name, value in inputs.items()})
                if stage.last:
                    self._results.append(self._loss(out, stage.module, part))
                elif stage.ranks[stage.index + 1] == self.axis.rank:
                    handed.append(out)
                else:
                    kept.append((self._send(out.contiguous(), stage), out))
        for work, _ in kept:
            work.wait()
        return self._collect(batch)

    @property
    def _last(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.last), None)

    def _collect(self, batch: Batch) -> RowLoss:
        """The results of all microbatches, in the order of rows."""
        results, self._results = self._results, []
        if not results:
            zeros = torch.zeros(batch.rows, device=batch.tokens.device)
            return RowLoss(zeros, zeros.long())
        return RowLoss(torch.cat([r.sums for r in results]), torch.cat([r.counts for r in results]))

    def _input(self, stage: Stage, rows: Batch) -> tuple[Any, Tensor]:
        """A stage's input, and what to wait for before it is there."""
        if stage.first:
            return None, rows.tokens
        x = self._border(stage, *rows.tokens.shape, device=rows.tokens.device)
        return dist.irecv(x, group=self.axis.group, group_src=stage.ranks[stage.index - 1]), x

    def _send(self, out: Tensor, stage: Stage) -> Any:
        return dist.isend(out, group=self.axis.group, group_dst=stage.ranks[stage.index + 1])

    def _border(self, stage: Stage, rows: int, seq: int, device: torch.device) -> Tensor:
        """Hidden states as they are between stages. # (rows, seq / parts, width)"""
        return torch.empty(rows, seq // self._parts, stage.width, dtype=self._dtype, device=device)

    def _schedule(self, rows: int, seq: int, depth: int, device: torch.device) -> Any:
        """torch's schedule for rows of this length, of which the last stage gives `depth` times as many besides."""
        size = self.config.pipeline_parallel_microbatch_size
        stages = [self._torch_stage(stage, size, seq, depth * stage.last, device) for stage in self.stages]
        settings: dict[str, Any] = {
            "n_microbatches": rows // size,
            "loss_fn": self._scalar_loss,
            "scale_grads": False,  # gradients are sums: the loss has been divided already
        }
        if self.config.pipeline_parallel_schedule_csv:
            schedule = _PipelineScheduleRuntime(stages, **settings)
            schedule._load_csv(self.config.pipeline_parallel_schedule_csv)  # the only way in; TorchTitan goes it too
            return schedule
        known = find_schedule(self.config.pipeline_parallel_schedule)
        make: Any = get_schedule_class(known.name)
        return make(stages[0] if known.shape == "single" else stages, **settings)

    def _torch_stage(self, stage: Stage, rows: int, seq: int, depth: int, device: torch.device) -> PipelineStage:
        hidden = self._border(stage, rows, seq, torch.device("meta")).requires_grad_()
        tokens = torch.empty(rows, seq, dtype=torch.int64, device="meta")
        make = _FakeStage if self._fake else _Stage
        return make(
            stage.module,
            stage.index,
            stage.count,
            device,
            input_args=tokens if stage.first else hidden,
            output_args=self._border(stage, rows * (1 + depth), seq, torch.device("meta")).requires_grad_(),
            group=self.axis.group,
            # torch's halves go by the way from a stage's input; what looks ahead has an embedding beside that way.
            dw_builder=_nothing_left if self._whole_backward or depth else None,
        )

    def _scalar_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """One microbatch's part of the loss. torch cuts the target by rows (`Batch.stacked`)."""
        last = self._last
        if last is None:
            raise RuntimeError("a rank without the last stage was asked for the loss")
        result = self._loss(hidden, last.module, Batch.unstacked(target))
        self._results.append(RowLoss(result.sums.detach(), result.counts))
        return result.sums.sum() / self._valid


def can_split_backward(job: JobConfig) -> bool:
    """Whether the weights' gradients can be computed apart from the inputs'."""
    compiled = job.compile.enable and "model" in job.compile.components
    freed = job.parallelism.fsdp_reshard_after_forward == "always"
    return job.activation_checkpoint.mode == "none" and not compiled and not freed


class _Stage(PipelineStage):
    """torch's stage, mended for torch 2.11: there it greets neighbours on its own rank, which gloo cannot; and a stage
    of nothing but the head, whose output is its input, detaches the buffer that it receives into."""

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_maybe_with_nosync(*args, **kwargs)
        return out.view_as(out) if args and out is args[0] else out

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _FakeStage(_Stage):
    """A stage whose neighbours do not exist: torch's stages vote on whether all shapes are given, which they are."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Any:
        return _Yes()

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Any:
        return _Yes()


class _Yes:
    """The vote's outcome, of which torch reads the number. A tensor would have none among fake tensors."""

    def item(self) -> int:
        return 1


def _nothing_left() -> Callable[[], None]:
    """What torch does for the second half of a backward whose first half was all of it."""
    return lambda: None
