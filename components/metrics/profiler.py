"""Profiling: traces of torch's profiler and snapshots of the allocator, every `profile_freq` steps.

Both are named by the step at which they were written: `iteration_N/rankR_trace.json`. One object serves both, since
they share their schedule and the loop's one call per step.
"""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from components.config.job import Profiling
from components.runtime.errors import ConfigError
from components.runtime.logging import logger

SNAPSHOT_ENTRIES = 100_000  # allocations that the allocator remembers: some 100 MB of host memory


class Profiler:
    """A context manager around the loop; `step` after every step. Without anything enabled it does nothing.

    `start_step` is the step that the run resumed from, 0 for a new one. Raises ConfigError where the settings do not
    fit together, or the device has no allocator to take snapshots of.
    """

    def __init__(
        self, config: Profiling, dump_folder: Path | str, rank: int, device: torch.device, start_step: int = 0
    ) -> None:
        problems = profiling_problems(config, device)
        if problems:
            raise ConfigError(*problems)
        self._config, self._rank, self._device = config, rank, device
        self._step, self._in_cycle = start_step, 0
        self._traces = Path(dump_folder) / config.save_traces_folder
        self._snapshots = Path(dump_folder) / config.save_memory_snapshot_folder
        self._profile: profile | None = None

    def __enter__(self) -> "Profiler":
        if self._config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)  # documented, but has no other name
        if self._config.enable_profiling:
            self._start_cycle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile:
            self._profile.stop()
        if self._config.enable_memory_snapshot:
            if isinstance(error, torch.OutOfMemoryError):
                self._snapshot(f"iteration_{self._step + 1}_out_of_memory")
            torch.cuda.memory._record_memory_history(enabled=None)

    def step(self) -> None:
        """A step is done."""
        self._step, self._in_cycle = self._step + 1, self._in_cycle + 1
        if self._profile:
            self._profile.step()
        if self._in_cycle < self._config.profile_freq:
            return
        self._in_cycle = 0
        if self._profile:
            self._profile.stop()
            self._start_cycle()
        if self._config.enable_memory_snapshot:
            self._snapshot(f"iteration_{self._step}")

    def rewind(self, step: int) -> None:
        """The job has gone back to where it was after `step`; the next trace comes when it would have come."""
        self._step = step

    def _start_cycle(self) -> None:
        """A profiler for one trace: one that repeats would keep or clear its events, and warn of either."""
        config = self._config
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(
            wait=config.profile_freq - config.profiler_warmup - config.profiler_active,
            warmup=config.profiler_warmup,
            active=config.profiler_active,
            repeat=1,
        )
        self._profile = profile(
            activities=activities, schedule=plan, on_trace_ready=self._write_trace, record_shapes=True
        )
        self._profile.start()

    def _write_trace(self, done: profile) -> None:
        if self._in_cycle <= self._config.profile_freq - self._config.profiler_active:
            return  # the run ended before the first step that would be in it
        path = self._traces / f"iteration_{self._step}" / f"rank{self._rank}_trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(path))
        logger.info("profile of step %d: %s", self._step, path)

    def _snapshot(self, name: str) -> None:
        path = self._snapshots / name / f"rank{self._rank}_memory_snapshot.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info("memory snapshot of step %d: %s", self._step, path)


def profiling_problems(config: Profiling, device: torch.device) -> list[str]:
    """Why `[profiling]` cannot be done; empty if it can."""
    problems = []
    needed = config.profiler_warmup + config.profiler_active
    if config.enable_profiling and config.profile_freq < needed:
        problems.append(
            f"profiling.profile_freq = {config.profile_freq}: less than profiler_warmup + profiler_active = {needed};"
            f" allowed: {needed} or more"
        )
    if config.enable_memory_snapshot and device.type != "cuda":
        problems.append(
            f"profiling.enable_memory_snapshot = true: the device is {device.type}, which has no allocator to take"
            " snapshots of; run on CUDA, or set it to false"
        )
    return problems
