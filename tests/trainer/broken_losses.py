"""Losses that go wrong, brought in by `experimental.custom_import` beside the tiny model."""

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.config.training import Loss
from components.loss.cross_entropy import CrossEntropy, LossFn, losses
from components.mesh.batch import Batch, RowLoss
from tests.trainer import tiny

__all__ = ["tiny"]


class NanOnRankOne:
    """The usual loss, but not a number in rank 1's second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        self.calls += 1
        rows = CrossEntropy()(hidden, head, batch)
        broken = self.calls == 2 and os.environ["RANK"] == "1"
        return RowLoss(rows.sums * torch.nan, rows.counts) if broken else rows


class HangsOnLastRank:
    """The usual loss, but the last rank's third call takes a minute; or it ends the process, or fails."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        self.calls += 1
        if self.calls == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            if self.how == "fails":
                raise LookupError("no such word")
            if self.how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        return CrossEntropy()(hidden, head, batch)


def build(config: Loss) -> LossFn:
    return NanOnRankOne()


def hanging(how: str) -> Callable[[Loss], LossFn]:
    return lambda config: HangsOnLastRank(how)


if "nan_on_rank_one" not in losses:
    for name in ("hangs", "fails", "stops"):
        losses.register(f"{name}_on_last_rank", hanging(name))
    losses.register("nan_on_rank_one", build)
