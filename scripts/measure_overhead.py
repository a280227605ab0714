"""What reporting costs: the share of a job's time spent in reports, sinks, the progress bar and garbage collection.

    .venv/bin/python scripts/measure_overhead.py --training.steps=60

Takes the keys of a job. Measured inside one run, by clocks around the calls: two runs side by side differ by more than
the thing that is measured. The device is waited for before each clock reading, so that nobody else's work is counted.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from components.metrics.step import StepMetrics
from trainer.command import import_custom
from trainer.config.load import load_job
from trainer.trainer import Trainer


class Stopwatch:
    """Adds up the seconds spent in the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def main(argv: list[str]) -> None:
    """Train, and print the shares after the first step, which warms up."""
    resolved = load_job([*argv, "--metrics.log_freq=1"], os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Trainer(resolved, os.environ)
    reporting, collecting = Stopwatch(), Stopwatch()
    steps: list[StepMetrics] = []
    trainer.meter.report = reporting.around(trainer.meter.report)
    trainer.sinks.advance = reporting.around(trainer.sinks.advance)
    log = reporting.around(trainer.sinks.log)

    def log_and_keep(metrics: StepMetrics) -> None:
        log(metrics)
        steps.append(metrics)
        if metrics.step == 1:
            reporting.seconds = collecting.seconds = 0.0

    trainer.sinks.log = log_and_keep
    trainer.collector.run = collecting.around(trainer.collector.run)
    trainer.train()
    trainer.close()
    seconds = sum(metrics.seconds for metrics in steps[1:])
    waited = sum(metrics.data_wait * metrics.seconds for metrics in steps[1:])
    print(f"{len(steps) - 1} steps in {seconds:.2f} s: reporting {reporting.seconds / seconds:.3%},", end=" ")
    print(f"garbage {collecting.seconds / seconds:.3%}, waiting for data {waited / seconds:.3%}")


if __name__ == "__main__":
    main(sys.argv[1:])
