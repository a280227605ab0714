import math
from typing import Any

import pytest

from components.config.optim import LRScheduler
from components.optim.schedule import LRSchedule, lr_factor
from components.runtime.errors import ConfigError


def _factors(steps: int, upto: int | None = None, **config: Any) -> list[float]:
    factor = lr_factor(LRScheduler(**config), steps)
    return [factor(step) for step in range(1, (upto or steps) + 1)]


def test_decay_starts_right_after_warm_up_and_ends_one_step_after_the_last() -> None:
    assert _factors(6, 8, warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_stable_phase() -> None:
    assert _factors(10, warmup_steps=2, decay_ratio=0.4) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_no_warm_up() -> None:
    assert _factors(4, warmup_steps=0) == [1.0, 0.75, 0.5, 0.25]


def test_no_decay() -> None:
    assert _factors(5, 7, warmup_steps=2, decay_ratio=0.0) == [0.5, 1, 1, 1, 1, 1, 1]


def test_all_decay() -> None:
    assert _factors(4, warmup_steps=0, decay_ratio=1.0) == [1.0, 0.75, 0.5, 0.25]


def test_all_warm_up() -> None:
    assert _factors(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_shapes() -> None:
    x = [0.0, 0.25, 0.5, 0.75]
    assert _factors(4, warmup_steps=0, decay_type="sqrt") == [1 - math.sqrt(v) for v in x]
    assert _factors(4, warmup_steps=0, decay_type="cosine") == [0.5 * (1 + math.cos(math.pi * v)) for v in x]


def test_floor() -> None:
    assert _factors(4, 6, warmup_steps=0, min_lr_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2], abs=1e-15)


def test_inverse_sqrt() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, math.sqrt(4 / 5), math.sqrt(4 / 6)]
    assert _factors(6, warmup_steps=4, decay_type="inverse_sqrt") == expected
    assert _factors(4, 16, warmup_steps=0, decay_type="inverse_sqrt")[15] == 0.25
    assert _factors(4, 16, warmup_steps=0, decay_type="inverse_sqrt", min_lr_factor=0.3)[15] == 0.3


def test_total_steps_stands_for_training_steps() -> None:
    assert _factors(2, 5, warmup_steps=0, total_steps=5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            LRScheduler(warmup_steps=11),
            "lr_scheduler.warmup_steps = 11: more than training.steps = 10; allowed: 0 to 10",
        ),
        (
            LRScheduler(warmup_steps=9, total_steps=8),
            "lr_scheduler.warmup_steps = 9: more than lr_scheduler.total_steps = 8; allowed: 0 to 8",
        ),
        (
            LRScheduler(warmup_steps=3, decay_ratio=0.8),
            "lr_scheduler: warmup_steps = 3 and decay_ratio = 0.8 (8 steps) do not fit into training.steps = 10;"
            " allowed: a decay_ratio up to 0.7",
        ),
        (
            LRScheduler(warmup_steps=3, decay_ratio=0.5, decay_type="inverse_sqrt"),
            "lr_scheduler.decay_ratio = 0.5: has no effect on decay_type = 'inverse_sqrt'; remove it",
        ),
    ],
)
def test_phases_that_do_not_fit(config: LRScheduler, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lr_factor(config, 10)
    assert str(caught.value) == problem


class _Recorder:
    factor = 0.0

    def set_lr_factor(self, factor: float) -> None:
        self.factor = factor


def test_apply_knows_only_the_step() -> None:
    recorder = _Recorder()
    schedule = LRSchedule(recorder, lr_factor(LRScheduler(warmup_steps=2), 6))
    schedule.apply(5)
    assert recorder.factor == 0.5
    schedule.apply(1)
    assert recorder.factor == 0.5
    schedule.apply(2)
    assert recorder.factor == 1.0
