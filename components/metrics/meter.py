"""Meter: from what happens in the loop to the numbers of a report.

Between reports it only adds integers and clock readings, so it never makes the host wait for the device. A report
reads the step's tensors in one transfer, which waits for the device, and only then the clock: rates are those of
finished work.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from components.mesh.batch import RowLoss
from components.metrics.memory import Memory, peak_memory
from components.metrics.step import StepMetrics, Validated
from components.runtime.distributed import all_reduce_max, all_reduce_sum

_TERA = 1e12


class Reduced(NamedTuple):
    """Facts of a global batch: 0-d tensors, equal on all ranks of the loss mesh."""

    loss_sum: Tensor
    """Loss summed over all valid labels, float64."""
    count: Tensor
    """Number of valid labels, int64."""
    max_loss: Tensor
    """Largest per-row mean loss, fp32."""


class StepValues(NamedTuple):
    """What is known of a step, over all ranks."""

    loss: float
    """Mean loss per valid label of the global batch."""
    max_loss: float
    """Largest per-row mean loss."""
    grad_norm: float
    """Global gradient norm before clipping."""


def largest_row_mean(rows: RowLoss) -> Tensor:
    """The largest mean loss of a row, 0-d fp32; rows without a valid label do not count (−inf if all are so)."""
    means = rows.sums.detach() / rows.counts
    return means.masked_fill(rows.counts == 0, -torch.inf).max()


def reduce_step(loss_sum: Tensor, count: Tensor, max_loss: Tensor, group: ProcessGroup | None) -> Reduced:
    """Reduce a rank's facts over `group` (the loss mesh; None is a group of one): one sum and one maximum.

    Sum and count travel together in float64, which is exact for counts up to 2^53.
    """
    sums = all_reduce_sum(torch.stack([loss_sum.detach().double(), count.double()]), group)
    largest = all_reduce_max(max_loss.detach().float().clone(), group)
    # A maximum over ranks may or may not let NaN through; the sum always does.
    return Reduced(sums[0], sums[1].long(), torch.where(sums[0].isnan(), torch.nan, largest))


class Meter:
    """Counts tokens and time between reports.

    `flops_per_token` is the model's, forward and backward; `ranks` share the work of every token; `peak` is one
    device's FLOP/s or None; `tokens` is what earlier runs of the job have seen.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        ranks: int,
        peak: float | None,
        device: torch.device,
        tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        memory: Callable[[torch.device], Memory] = peak_memory,
    ) -> None:
        self.tokens = tokens
        self._flops_per_token, self._ranks, self._peak, self._device = flops_per_token, ranks, peak, device
        self._clock, self._memory = clock, memory
        self.start()

    def start(self) -> None:
        """Begin a new interval now: before the first step, and by itself after each report."""
        self._begin, self._waited, self._paused = self._clock(), 0.0, 0.0
        self._steps = self._computed = 0

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Around whatever waits for data."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    @contextmanager
    def pause(self) -> Generator[None]:
        """Around what is no training, such as validation and saving: it counts in no rate."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def add(self, tokens: int, computed: int) -> None:
        """Count a step: valid label tokens, and all positions that were computed, over all ranks."""
        self.tokens += tokens
        self._computed += computed
        self._steps += 1

    def report(
        self, step: int, values: StepValues | None, lr: float, validation: float | Validated | None = None
    ) -> StepMetrics:
        """The numbers of step `step` and the rates since the last report. `values`: None if it was not computed."""
        seconds = max(self._clock() - self._begin - self._paused, 1e-9)
        rate = self._computed / seconds
        flops = rate * self._flops_per_token / self._ranks
        memory = self._memory(self._device)
        held_out = validation if isinstance(validation, Validated) else Validated(validation, {})
        metrics = StepMetrics(
            step=step,
            loss=values.loss if values else None,
            max_loss=values.max_loss if values else None,
            grad_norm=values.grad_norm if values else None,
            lr=lr,
            tokens=self.tokens,
            tokens_per_second=rate,
            tflops=flops / _TERA,
            mfu=flops / self._peak if self._peak else None,
            memory_gib=memory.gib,
            data_wait=self._waited / seconds,
            seconds=seconds / max(self._steps, 1),
            validation_loss=held_out.loss,
            validation_losses=held_out.sets,
            memory_share=memory.share,
        )
        self.start()
        return metrics
