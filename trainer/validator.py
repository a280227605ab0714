"""Validation: the mean loss per valid token of held-out rows, through the Trainer's own forward path.

Each pass reads the same rows from their start. Losses and counts are added up over all rows of all ranks and divided
once, so the result depends neither on the layout nor on how rows fall into batches. Of several sets each has its own
mean, and the whole is that of all their tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from components.data.names import name_of
from components.metrics.meter import Reduced, reduce_step
from components.metrics.step import Validated
from components.runtime.errors import DataError

if TYPE_CHECKING:
    from components.config.training import Validation
    from components.data.loader import Loader
    from trainer.trainer import Trainer


def sets_of(config: Validation) -> dict[str, Validation]:
    """Each validation set by its name, as a section of its own."""
    if not config.sources:
        return {config.dataset: config}
    return {name_of(source): replace(config, sources=[source]) for source in config.sources}


class Validator:
    """Validates a Trainer's model on the sets of `[validation]`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.job.validation
        self.loaders = {name: trainer.build_loader(section) for name, section in sets_of(self.config).items()}

    @torch.no_grad()
    def validate(self, step: int) -> float | Validated:
        """The mean loss after `step` steps, of each set where there are several; equal on all ranks. Collective.

        Raises DataError if a set has no valid token.
        """
        for model in self.trainer.models:
            model.eval()
        totals = {name: self.total(loader) for name, loader in self.loaders.items()}
        for model in self.trainer.models:
            model.train()
        for name, total in totals.items():
            if not total.count:
                raise DataError(
                    f"validation set {name!r}: no valid label token in what was read of it, nothing to judge by: raise"
                    " validation.steps, or give other documents"
                )
        losses = {name: float(total.loss_sum / total.count) for name, total in totals.items()}
        if len(losses) == 1:
            return next(iter(losses.values()))
        whole = sum(float(x.loss_sum) for x in totals.values()) / sum(int(x.count) for x in totals.values())
        return Validated(whole, losses)

    def total(self, loader: Loader) -> Reduced:
        """Loss and labels of one set, over all ranks."""
        trainer, group = self.trainer, self.trainer.dims.group("batch")
        loss = torch.zeros((), dtype=torch.float64, device=trainer.device)
        count = torch.zeros((), dtype=torch.int64, device=trainer.device)
        steps = loader.steps(group, trainer.device)
        for rows in itertools.islice(steps, None if self.config.steps == -1 else self.config.steps):
            for batch in trainer.microbatches(rows.batch, self.config.local_batch_size):
                result = trainer.evaluate(batch)
                loss += result.sums.sum()
                count += result.counts.sum()
        return reduce_step(loss, count, torch.zeros((), device=trainer.device), group)

    def close(self) -> None:
        """Nothing is kept between passes."""
