"""Sinks: where reports go. One fan-out, so that the Trainer reports once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from components.config.job_config import JobConfig
from components.metrics.boards import TensorBoardSink, WandbSink
from components.metrics.console import console_sink
from components.metrics.jsonl import JsonlSink
from components.metrics.step import StepMetrics
from components.runtime.logging import prints_messages
from components.runtime.world import World

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """One place that reports go to."""

    def log(self, metrics: StepMetrics) -> None:
        """Report a step, its validation included."""
        ...

    def note(self, event: dict[str, Any]) -> None:
        """Record something that is no step, such as a skipped one: `event` names it, `step` says when."""
        ...

    def advance(self, step: int) -> None:
        """Step `step` is done, whether or not it is reported. Costs nothing but on a terminal."""
        ...

    def rewind(self, step: int) -> None:
        """The job has gone back to where it was after `step`; later steps will be reported anew."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class Sinks:
    """All sinks of a rank; itself a Sink, and a context manager that closes them.

    Two threads may use it: a stop on a signal closes it while training is about to report. What comes later is dropped.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self._lock, self._closed = threading.Lock(), False

    def log(self, metrics: StepMetrics) -> None:
        """Report a step."""
        self._each(lambda sink: sink.log(metrics))

    def note(self, event: dict[str, Any]) -> None:
        """Record an event."""
        self._each(lambda sink: sink.note(event))

    def advance(self, step: int) -> None:
        """A step is done."""
        self._each(lambda sink: sink.advance(step))

    def rewind(self, step: int) -> None:
        """The job has gone back."""
        self._each(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Close all, also after an error of one; a second time nothing happens. Raises the first error."""
        with self._lock, ExitStack() as closing:
            sinks, self._closed = () if self._closed else self.sinks, True
            for sink in reversed(sinks):
                closing.callback(sink.close)

    def _each(self, call: Callable[[Sink], None]) -> None:
        with self._lock:
            for sink in () if self._closed else self.sinks:
                call(sink)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def build_sinks(job: JobConfig, world: World, dump_folder: Path | str, resume_step: int | None) -> Sinks:
    """The sinks of this rank. `resume_step` is the step that the run resumed from; None for a new run.

    Rank 0 writes `metrics.jsonl` and the boards; with `metrics.save_for_all_ranks` every rank writes boards of its own
    (`rank_N`). The ranks of LOG_RANK print. Raises UserError or ConfigError where one cannot be opened.
    """
    folder, config, sinks = Path(dump_folder), job.metrics, list[Sink]()
    boards = world.rank == 0 or config.save_for_all_ranks
    own = f"rank_{world.rank}" if config.save_for_all_ranks else ""
    with ExitStack() as opened:  # if one cannot be opened, those before it are closed

        def add(sink: Sink) -> None:
            opened.callback(sink.close)
            sinks.append(sink)

        if config.enable_wandb and boards:
            add(WandbSink(job, folder))
        if world.rank == 0:
            add(JsonlSink(folder / METRICS_FILE, resume_step))
        if config.enable_tensorboard and boards:
            add(TensorBoardSink(folder / config.save_tb_folder / own, resume_step))
        if prints_messages():
            add(console_sink(job.training.steps, resume_step or 0, config.disable_color_printing))
        opened.pop_all()
    return Sinks(sinks)
