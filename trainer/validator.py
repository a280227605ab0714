"""Validation: the mean loss per valid token of held-out rows, through the Trainer's own forward path.

Each pass reads the same rows from their start. Losses and counts are added up over all rows of all ranks and divided
once, so the result depends neither on the layout nor on how rows fall into batches. Of several sets each has its own
mean, and the whole is that of all their tokens. A set without any label has no mean; that is told, and ends no job.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from components.data.names import name_of
from components.metrics.meter import Reduced, reduce_step
from components.metrics.step import Validated
from components.runtime.logging import logger, prints_messages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        self.unknown: set[str] = set()  # sets that have been told to have no label

    @torch.no_grad()
    def validate(self, step: int) -> float | Validated:
        """The mean loss after `step` steps, of each set where there are several; equal on all ranks. Collective."""
        for model in self.trainer.models:
            model.eval()
        totals = {name: self.total(loader) for name, loader in self.loaders.items()}
        for model in self.trainer.models:
            model.train()
        losses = {name: mean([total]) for name, total in totals.items()}
        self.tell_unknown(losses)
        whole = mean(list(totals.values()))
        return whole if len(losses) == 1 and whole is not None else Validated(whole, losses)

    def tell_unknown(self, losses: Mapping[str, float | None]) -> None:
        """Warn of sets without a loss, of each once, and not on all ranks, which find the same."""
        found = {name for name, loss in losses.items() if loss is None} - self.unknown
        self.unknown |= found
        for name in sorted(found) if prints_messages() else ():
            logger.warning(
                "validation set %r: no valid label token in what was read of it, so its loss is not known; raise"
                " validation.steps, or give other documents",
                name,
            )

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


def mean(totals: Sequence[Reduced]) -> float | None:
    """The mean loss per label; None of none. Each is equal on all ranks, so this is."""
    count = sum(int(x.count) for x in totals)
    return sum(float(x.loss_sum) for x in totals) / count if count else None
