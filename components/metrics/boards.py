"""TensorBoard and Weights & Biases. Both are imported when they are switched on, not before."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.config.job_config import JobConfig
from components.metrics.step import StepMetrics
from components.runtime.errors import ConfigError


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """What boards plot over the step: every number that is known, under its name in `metrics.jsonl`; that of a
    validation set as `validation_loss/<name>`."""
    plain = {key: value for key, value in metrics.to_dict().items() if key not in ("step", "validation_losses")}
    sets = {f"validation_loss/{name}": loss for name, loss in metrics.validation_losses.items()}
    return {key: value for key, value in (plain | sets).items() if value is not None}


class TensorBoardSink:
    """Event files in a folder. Earlier events from the first step of this run on are marked as void."""

    def __init__(self, folder: Path | str, resume_step: int | None) -> None:
        self._folder = str(folder)
        self._open(resume_step or 0)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def log(self, metrics: StepMetrics) -> None:
        """Write a step."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def note(self, event: dict[str, Any]) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Later events are void."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases. Its variables say where it goes; without WANDB_PROJECT the project is "espalier".

    Raises ConfigError if the package is not there.
    """

    def __init__(self, job: JobConfig, folder: Path | str) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "metrics.enable_wandb = true: the package wandb is not installed; install it with"
                " `pip install 'espalier[wandb]'`, or set it to false"
            ) from error
        project = os.environ.get("WANDB_PROJECT", "espalier")
        self._run = wandb.init(project=project, dir=str(folder), config=asdict(job), notes=job.job.description)

    def log(self, metrics: StepMetrics) -> None:
        """Send a step."""
        self._run.log(scalars(metrics), step=metrics.step)

    def note(self, event: dict[str, Any]) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing: a run's steps only grow there, so that those run again keep what was sent first."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()
