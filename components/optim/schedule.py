"""Learning-rate schedules: a pure function of the step's number.

There is no scheduler state to save, restore or step too often: whoever knows the step knows the rate. Torch's LambdaLR
was rejected for that reason. As in TorchTitan the decay ends at its floor one step after the last, so that no step is
spent at a rate of 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from components.config.optim import LRScheduler
from components.runtime.errors import ConfigError


class HasLearningRate(Protocol):
    """What a schedule drives; `Optimizers` is one."""

    def set_lr_factor(self, factor: float) -> None:
        """Let the learning rate be `factor` times its peak."""
        ...


class LRSchedule:
    """Applies a factor to optimizers."""

    def __init__(self, optimizers: HasLearningRate, factor: Callable[[int], float]) -> None:
        self._optimizers, self.factor = optimizers, factor

    def apply(self, step: int) -> None:
        """Set the learning rate that step `step` (from 1) uses."""
        self._optimizers.set_lr_factor(self.factor(step))


class Phases(NamedTuple):
    """Steps of each phase; what is left between warm-up and decay is at the peak."""

    total: int
    warmup: int
    decay: int


def phases(config: LRScheduler, steps: int) -> Phases:
    """The phases of a schedule over `total_steps`, else over `steps`, cut to fit: first the warm-up, then the decay."""
    total = config.total_steps or steps
    warmup = min(config.warmup_steps, total)
    decay = total if config.decay_ratio is None else round(total * config.decay_ratio)
    return Phases(total, warmup, min(decay, total - warmup))


def schedule_notes(config: LRScheduler, steps: int) -> list[str]:
    """What had to be cut, as a short trial of a long job's config makes necessary (and as TorchTitan does)."""
    total, warmup, decay = phases(config, steps)
    notes = []
    if warmup < config.warmup_steps:
        notes.append(f"lr_scheduler.warmup_steps = {config.warmup_steps}: cut to the {total} steps that there are")
    if config.decay_ratio is not None and decay < round(total * config.decay_ratio):
        notes.append(
            f"lr_scheduler.decay_ratio = {config.decay_ratio}: cut to the {decay} of {total} steps that follow warm-up"
        )
    return notes


def schedule_problems(config: LRScheduler) -> list[str]:
    """Why these keys make no schedule; empty if they do."""
    if config.decay_type != "inverse_sqrt":
        return []
    problems = []
    if config.decay_ratio is not None:
        problems.append(f"lr_scheduler.decay_ratio = {config.decay_ratio}: means nothing to inverse_sqrt; remove it")
    if config.warmup_steps == 0:
        problems.append(
            "lr_scheduler.warmup_steps = 0: inverse_sqrt decays from the end of warm-up W as √(W/step), which is 0"
            " without one; take at least 1, or another lr_scheduler.decay_type"
        )
    return problems


def lr_factor(config: LRScheduler, steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate for each step, counted from 1.

    Of T steps (`total_steps`, else `steps`) the first W warm up: s / W. The last D decay, D being T − W without
    `decay_ratio` r, else round(r·T): with x = (s − (T + 1 − D)) / D from 0 on, the shape falls from 1 to
    `min_lr_factor` at x = 1, which is step T + 1; later steps stay there. inverse_sqrt is √(W / s) after the warm-up,
    down to `min_lr_factor`. Phases that do not fit are cut, see `phases`. Raises ConfigError, see `schedule_problems`.
    """
    if problems := schedule_problems(config):
        raise ConfigError(*problems)
    total, warmup, decay = phases(config, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.decay_type == "inverse_sqrt":
            return max(math.sqrt(warmup / step), config.min_lr_factor)
        if step <= total + 1 - decay or not decay:
            return 1.0
        x = min((step - (total + 1 - decay)) / decay, 1.0)
        return config.min_lr_factor + (1.0 - config.min_lr_factor) * _SHAPES[config.decay_type](x)

    return factor


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}
