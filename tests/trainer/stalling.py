"""Ranks that stop in mid-run, brought in by `experimental.custom_import` beside the tiny model: the rank STALL_RANK."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from components.config.training import Loss
from components.data.documents import DatasetRequest
from components.data.indexed import SyntheticRows
from components.data.registry import datasets
from components.loss.cross_entropy import CrossEntropy, LossFn, losses
from components.mesh.batch import Batch, RowLoss
from tests.trainer import tiny

__all__ = ["tiny"]


def stalls() -> bool:
    """Whether this process is the one; it then leaves its number and the time in the file STALL_FILE."""
    if os.environ["RANK"] != os.environ["STALL_RANK"]:
        return False
    Path(os.environ["STALL_FILE"]).write_text(f"{os.getpid()} {time.time()}")
    return True


class Stops:
    """The usual loss, but the rank's third call stops its process."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        self.calls += 1
        if self.calls == 3 and stalls():
            os.kill(os.getpid(), signal.SIGSTOP)
        return CrossEntropy()(hidden, head, batch)


class Sleeps(SyntheticRows):
    """Synthetic rows, of which those of the third step come late on the rank."""

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        if n >= 24 and stalls():
            time.sleep(60)
        return super().row(n)


def build(config: Loss) -> LossFn:
    return Stops()


def sleeping(request: DatasetRequest) -> Sleeps:
    return Sleeps(request.seed, request.vocab_size, request.seq_len)


if "stops" not in losses:
    losses.register("stops", build)
    datasets.register("sleeps", sleeping)
