"""Signals to `run_train.sh` with two ranks: it passes them on, waits for the save, returns 75, and nothing restarts."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.reliability.interrupted import JOB
from tests.reliability.test_signals import events, saved
from tests.trainer.runs import records
from tests.trainer.test_launch import SCRIPT, environment, workers

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The job on two ranks."""
    return subprocess.Popen(
        [SCRIPT, *JOB, f"--job.dump_folder={folder}", *arguments],
        env=environment(NGPU="2", HOLD_MARK=f"{folder}/held", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize(
    ("seconds", "restarts"),
    [(4, 1), pytest.param(45, 0, marks=pytest.mark.slow), pytest.param(45, 1, marks=pytest.mark.slow)],
)
def test_a_long_save_is_waited_for_and_nothing_restarts(seconds: int, restarts: int, tmp_path: Path) -> None:
    """SIGUSR1 saves and goes on; then, with the next save under way, SIGTERM, four times in a hurry."""
    child = start(
        tmp_path,
        "--training.steps=100000",
        "--checkpoint.grace_seconds=100",
        HOLD=f"data 3 1 0 save 2 {seconds} 1",
        MAX_RESTARTS=str(restarts),
    )
    wait_for(tmp_path / "0.data")
    child.send_signal(USR1)
    wait_for(tmp_path / "checkpoint" / "step-2")
    time.sleep(1)
    begin = time.monotonic()
    for _ in range(4):
        child.send_signal(TERM)
        time.sleep(0.3)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 75, err
    assert seconds < time.monotonic() - begin < seconds + 10
    found = events(tmp_path)
    step = len(records(tmp_path))
    assert [(e["event"], e["step"], e["reason"]) for e in found] == [
        ("saved_on_signal", 2, "SIGUSR1"),
        ("stopped", step, "SIGTERM"),
    ]
    assert step > 2
    assert saved(tmp_path) == [2, step]
    assert err.count("model: ") == 1  # started once
    assert err.splitlines()[-1] == f"SIGTERM: stopped after step {step}; the same command goes on from there"
    assert "error" not in err


@pytest.mark.slow
def test_a_killed_rank_comes_back_from_the_last_checkpoint(tmp_path: Path) -> None:
    """And what the first attempt left for the launcher says nothing of the second, which is stopped by one rank."""
    child = start(tmp_path, "--checkpoint.interval=2", HOLD="data 4 1 1", MAX_RESTARTS="1")
    wait_for(tmp_path / "1.data")
    os.kill(workers(child.pid)[1], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [("resume", 2)]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "loaded step-2" in err


@pytest.mark.slow
def test_signals_at_the_end_of_a_job_do_not_change_its_code(tmp_path: Path) -> None:
    """The workers have ended, and the launcher is about to."""
    child = start(tmp_path)
    wait_for(tmp_path / "checkpoint" / "step-6")
    while child.poll() is None:
        child.send_signal(USR1)
        time.sleep(0.02)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert saved(tmp_path) == [6]


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_end_at_once(tmp_path: Path) -> None:
    """The store dies with it, so that they cannot agree on anything any more."""
    child = start(tmp_path, "--training.steps=100000", HOLD="data 3 1 0")
    wait_for(tmp_path / "0.data")
    ranks = workers(child.pid)
    child.kill()
    end = time.monotonic() + 15
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    child.communicate(timeout=60)
    assert saved(tmp_path) == []
