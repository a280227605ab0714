"""Validation: the mean loss per valid token of held-out rows, through the Trainer's own forward path.

Each pass reads the same rows from their start. Losses and counts are added up over all rows of all ranks and divided
once, so the result depends neither on the layout nor on how rows fall into batches.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from components.metrics.meter import reduce_step
from components.runtime.errors import DataError

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class Validator:
    """Validates a Trainer's model on `[validation]`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.job.validation
        self.loader = trainer.build_loader(validation=True)

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """The mean loss after `step` steps, equal on all ranks. Collective. Raises DataError without a valid token."""
        trainer = self.trainer
        loss = torch.zeros((), dtype=torch.float64, device=trainer.device)
        count = torch.zeros((), dtype=torch.int64, device=trainer.device)
        for model in trainer.models:
            model.eval()
        steps = self.loader.steps(trainer.dims.group("batch"), trainer.device)
        for rows in itertools.islice(steps, None if self.config.steps == -1 else self.config.steps):
            for batch in trainer.microbatches(rows.batch, self.config.local_batch_size):
                result = trainer.evaluate(batch)
                loss += result.sums.sum()
                count += result.counts.sum()
        for model in trainer.models:
            model.train()
        total = reduce_step(loss, count, torch.zeros((), device=trainer.device), trainer.dims.group("batch"))
        if not total.count:
            raise DataError(
                f"validation.dataset = {self.config.dataset!r}: no valid label token in it, nothing to judge by"
            )
        return float(total.loss_sum / total.count)

    def close(self) -> None:
        """Nothing is kept between passes."""
