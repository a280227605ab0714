import math
from typing import Any

import pytest

from components.config.optim import LRScheduler
from components.optim.schedule import LRSchedule, lr_factor, schedule_notes
from components.runtime.errors import ConfigError


def _factors(steps: int, upto: int | None = None, **config: Any) -> list[float]:
    factor = lr_factor(LRScheduler(**config), steps)
    return [factor(step) for step in range(1, (upto or steps) + 1)]


@pytest.mark.shows("lr_scheduler.warmup_steps")
def test_decay_starts_right_after_warm_up_and_ends_one_step_after_the_last() -> None:
    assert _factors(6, 8, warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.shows("lr_scheduler.decay_ratio")
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


@pytest.mark.shows("lr_scheduler.decay_type")
def test_shapes() -> None:
    x = [0.0, 0.25, 0.5, 0.75]
    assert _factors(4, warmup_steps=0, decay_type="sqrt") == [1 - math.sqrt(v) for v in x]
    assert _factors(4, warmup_steps=0, decay_type="cosine") == [0.5 * (1 + math.cos(math.pi * v)) for v in x]


@pytest.mark.shows("lr_scheduler.min_lr_factor")
def test_floor() -> None:
    assert _factors(4, 6, warmup_steps=0, min_lr_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2], abs=1e-15)


def test_inverse_sqrt() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, math.sqrt(4 / 5), math.sqrt(4 / 6)]
    assert _factors(6, warmup_steps=4, decay_type="inverse_sqrt") == expected
    assert _factors(4, 16, warmup_steps=1, decay_type="inverse_sqrt")[15] == 0.25
    assert _factors(4, 16, warmup_steps=1, decay_type="inverse_sqrt", min_lr_factor=0.3)[15] == 0.3


@pytest.mark.shows("lr_scheduler.total_steps")
def test_total_steps_stands_for_training_steps() -> None:
    assert _factors(2, 5, warmup_steps=0, total_steps=5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)


@pytest.mark.parametrize(
    ("config", "note", "factors"),
    [
        (
            LRScheduler(warmup_steps=8),
            "lr_scheduler.warmup_steps = 8: cut to the 4 steps that there are",
            [0.25, 0.5, 0.75, 1.0],
        ),
        (
            LRScheduler(warmup_steps=2, decay_ratio=0.75),
            "lr_scheduler.decay_ratio = 0.75: cut to the 2 of 4 steps that follow warm-up",
            [0.5, 1.0, 1.0, 0.5],
        ),
    ],
)
def test_phases_that_do_not_fit_are_cut(config: LRScheduler, note: str, factors: list[float]) -> None:
    assert schedule_notes(config, 4) == [note]
    assert [lr_factor(config, 4)(step) for step in range(1, 5)] == factors
    assert schedule_notes(config, 400) == []


def test_inverse_sqrt_has_no_decay_phase_and_needs_a_warm_up() -> None:
    config = LRScheduler(warmup_steps=0, decay_ratio=0.5, decay_type="inverse_sqrt")
    with pytest.raises(ConfigError) as caught:
        lr_factor(config, 10)
    assert caught.value.problems == (
        "lr_scheduler.decay_ratio = 0.5: means nothing to inverse_sqrt; remove it",
        "lr_scheduler.warmup_steps = 0: inverse_sqrt decays from the end of warm-up W as √(W/step), which is 0 without"
        " one; take at least 1, or another lr_scheduler.decay_type",
    )


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
