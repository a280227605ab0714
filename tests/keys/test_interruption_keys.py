"""What `training.exit_after` and `checkpoint.grace_seconds` do: a job ends by itself, and in time."""

import signal
import time
from pathlib import Path

import pytest

from tests.reliability.interrupted import Shot, interrupt
from tests.reliability.test_signals import events, saved
from trainer.config.load import load_job
from trainer.config.validate import validate

shows = pytest.mark.shows


@shows("training.exit_after", "checkpoint.grace_seconds")
def test_a_job_ends_before_its_time_is_over(tmp_path: Path) -> None:
    """It began 78 s ago, may last for 100 s, and wants 20 s for its end: 2 s are left for its steps."""
    begin = time.time()
    clock = {"ESPALIER_STARTED": str(begin - 78)}
    arguments = ("--training.exit_after=100", "--training.steps=100000")
    [ended] = interrupt(1, tmp_path, arguments, **clock)
    assert ended.code == 75, ended.err
    assert time.time() > begin + 2
    [event] = events(tmp_path)
    assert (event["event"], event["reason"]) == ("stopped", "training.exit_after")
    assert saved(tmp_path) == [event["step"]]


@shows("checkpoint.grace_seconds")
def test_what_takes_longer_than_the_grace_is_given_up(tmp_path: Path) -> None:
    arguments = ("--checkpoint.grace_seconds=1",)
    [ended] = interrupt(1, tmp_path, arguments, [Shot(signal.SIGTERM, (0,), ("held0",))], HOLD="step 2 inf 0")
    assert ended.code == 1
    assert 0.5 < ended.seconds < 3
    assert (
        "not saved within checkpoint.grace_seconds = 1: this rank waits for its training thread, in step 2" in ended.err
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--training.exit_after=300", "--checkpoint.enable"),
            "training.exit_after = 300: must be above checkpoint.grace_seconds = 300, by which the run stops before it;"
            " raise this, or lower that",
        ),
        (
            ("--training.exit_after=400",),
            "training.exit_after = 400: nothing would be saved, since checkpoint.enable is false; set that to true, or"
            " this to 0",
        ),
        (
            ("--training.exit_after=400", "--checkpoint.enable", "--checkpoint.load_only"),
            "training.exit_after = 400: nothing would be saved, since checkpoint.load_only is true; set that to false,"
            " or this to 0",
        ),
    ],
)
def test_a_job_that_ends_by_the_clock_must_be_able_to_save(arguments: tuple[str, ...], line: str) -> None:
    assert validate(load_job(arguments, {}).job, 1, None) == [line]
