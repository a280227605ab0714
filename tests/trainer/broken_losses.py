"""Losses that go wrong, brought in by `experimental.custom_import` beside the tiny model."""

import os

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


def build(config: Loss) -> LossFn:
    return NanOnRankOne()


if "nan_on_rank_one" not in losses:
    losses.register("nan_on_rank_one", build)
