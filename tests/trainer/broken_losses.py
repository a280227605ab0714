"""Losses that go wrong, brought in by `experimental.custom_import` beside the tiny model."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

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


class Faulty:
    """The usual loss, but rows named in the variable FAULTS get it times a factor, or end the process.

    FAULTS: JSON, case → sum of a row's tokens and labels → {"factor": number, "once": file} (only while there is no
    such file, which is then made) or {"kill": file} (only while there is such a file, which is then removed). What rows
    there are is written to the file ROWS, a call a line.
    """

    def __init__(self, case: str) -> None:
        self.faults: dict[str, dict[str, str]] = json.loads(os.environ.get("FAULTS", "{}")).get(case, {})

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        rows = CrossEntropy()(hidden, head, batch)
        names = [str(name) for name in (1_000 * batch.tokens.sum(1) + batch.labels.sum(1)).tolist()]
        if path := os.environ.get("ROWS"):
            with open(path, "a") as file:
                file.write(" ".join(names) + "\n")
        factors = torch.tensor([self.factor(self.faults.get(name, {})) for name in names])
        return RowLoss(rows.sums * factors, rows.counts)

    def factor(self, fault: dict[str, str]) -> float:
        if "kill" in fault and Path(fault["kill"]).exists():
            Path(fault["kill"]).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if "factor" not in fault or ("once" in fault and Path(fault["once"]).exists()):
            return 1.0
        if "once" in fault:
            Path(fault["once"]).touch()
        return float(fault["factor"])


class Jumping:
    """The usual loss, twice as large in the third step of two calls each, and four times in the fifth."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        self.calls += 1
        rows = CrossEntropy()(hidden, head, batch)
        return RowLoss(rows.sums * {5: 2, 6: 2, 9: 4, 10: 4}.get(self.calls, 1), rows.counts)


def jumping(config: Loss) -> LossFn:
    return Jumping()


def faulty(case: str) -> Callable[[Loss], LossFn]:
    return lambda config: Faulty(case)


def build(config: Loss) -> LossFn:
    return NanOnRankOne()


def hanging(how: str) -> Callable[[Loss], LossFn]:
    return lambda config: HangsOnLastRank(how)


if "nan_on_rank_one" not in losses:
    for name in ("hangs", "fails", "stops"):
        losses.register(f"{name}_on_last_rank", hanging(name))
    losses.register("nan_on_rank_one", build)
    losses.register("jumping", jumping)
    for case in ("none", "nan", "once", "spikes", "many"):
        losses.register(f"faulty_{case}", faulty(case))
