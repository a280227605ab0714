"""Learning-rate schedules: a pure function of the step's number.

There is no scheduler state to save, restore or step too often: whoever knows the step knows the rate. Torch's LambdaLR
was rejected for that reason. As in TorchTitan the decay ends at its floor one step after the last, so that no step is
spent at a rate of 0.
"""

import math
from collections.abc import Callable
from typing import Protocol

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


def lr_factor(config: LRScheduler, steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate for each step, counted from 1.

    Of T steps (`total_steps`, else `steps`) the first W warm up: s / W. The last D decay, D being T − W without
    `decay_ratio` r, else round(r·T): with x = (s − (T + 1 − D)) / D from 0 on, the shape falls from 1 to
    `min_lr_factor` at x = 1, which is step T + 1; later steps stay there. inverse_sqrt is √(W / s) after the warm-up,
    down to `min_lr_factor`. Raises ConfigError if the phases do not fit into T.
    """
    total, warmup = config.total_steps or steps, config.warmup_steps
    problems = _problems(config, total)
    if problems:
        raise ConfigError(*problems)
    decay = _decay_steps(config, total)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.decay_type == "inverse_sqrt":
            return max(math.sqrt(max(warmup, 1) / step), config.min_lr_factor)
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


def _decay_steps(config: LRScheduler, total: int) -> int:
    if config.decay_ratio is None:
        return total - config.warmup_steps
    return round(total * config.decay_ratio)


def _problems(config: LRScheduler, total: int) -> list[str]:
    key = "training.steps" if config.total_steps is None else "lr_scheduler.total_steps"
    warmup, decay = config.warmup_steps, _decay_steps(config, total)
    if warmup > total:
        return [f"lr_scheduler.warmup_steps = {warmup}: more than {key} = {total}; allowed: 0 to {total}"]
    if config.decay_type == "inverse_sqrt":
        if config.decay_ratio is None:
            return []
        return [
            f"lr_scheduler.decay_ratio = {config.decay_ratio}: has no effect on decay_type = 'inverse_sqrt'; remove it"
        ]
    if warmup + decay > total:
        return [
            f"lr_scheduler: warmup_steps = {warmup} and decay_ratio = {config.decay_ratio} ({decay} steps) do not fit"
            f" into {key} = {total}; allowed: a decay_ratio up to {(total - warmup) / total:.4g}"
        ]
    return []
