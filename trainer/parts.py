"""What of a running job is saved: its parts, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors, optimizer_tensors

if TYPE_CHECKING:
    from components.data.loader import Loader
    from components.optim.optimizers import Optimizers

CPU = torch.device("cpu")


@dataclass
class Progress:
    """How far a job is."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Valid label tokens trained on."""
    schedule_start: int = 0
    """Step that the learning-rate schedule counts from."""
    cursors: Tensor | None = None
    """Where the streams of this rank's rows go on; None where they begin. # (rows, width) int64"""
    generators: bytes | None = None
    """State of this rank's random generators (`seeds.generator_state`); None: as they are now."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last accepted steps, for `training.on_spike`; never changed in place."""
    passed_over: list[int] = field(default_factory=list)
    """Steps whose batch is not trained on, ascending: bad steps that the job has gone back from."""


@dataclass(frozen=True)
class Parts:
    """What is saved of a job, besides its progress."""

    models: list[nn.Module]
    optimizers: Optimizers
    loader: Loader
    data_rank: int
    data_degree: int
    tied: Sequence[tuple[nn.Parameter, nn.Parameter]] = ()
    """Parameters that two of the models hold, each with its copy, which is not saved."""
    device: torch.device = CPU
    """Whose generator is saved, besides those of the CPU."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, as `<part>.<name>`; the very tensors, to save from or load into.

        Looked up once, before training: a model in the midst of a forward has its gathered parameters in their places.
        """
        return {**self.weights, **optimizer_tensors(self.optimizers.named_state())}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The models' tensors alone."""
        return model_tensors(self.models, [copy for _, copy in self.tied])

    def table(self, cursors: Tensor | None, ranks: Ranks) -> list[list[int]]:
        """The cursors of all rows of a batch in global order, from those of this rank's rows. Collective."""
        if cursors is None:
            return []
        everyone = dict(ranks.all_gather((self.data_rank, cursors.tolist())))
        return [row for rows in zip(*(everyone[rank] for rank in range(self.data_degree)), strict=True) for row in rows]

    @torch.no_grad()
    def equalize(self) -> None:
        """Give what was loaded to the copies."""
        for parameter, copy in self.tied:
            copy.copy_(parameter)
            self.optimizers.copy_state(parameter, copy)
