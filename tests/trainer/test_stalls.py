"""A rank that hangs, fails or dies while the others wait for it: the job says which, where, and in which collective."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from components.runtime.witness import Answer, stalled
from tests.trainer.runs import ROOT, launch, meeting_point
from tests.trainer.test_launch import QUIET, SCRIPT, environment, run

LATE = (
    *QUIET,
    "--experimental.custom_import=tests.trainer.broken_losses",
    "--training.local_batch_size=6",
    "--comm.train_timeout_seconds=3",
)
STALLING = (
    *QUIET,
    "--experimental.custom_import=tests.trainer.stalling",
    "--comm.train_timeout_seconds=2",
)
HOME = re.escape(socket.gethostname()) + r", pid (\d+)"
LAST = re.compile(r"error: \[rank \d\] a collective has failed, as told above")


def told(text: str) -> str:
    """The line that tells of a hung rank, once; the launcher ends with a line that points at it."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, text
    assert LAST.fullmatch(lines[1])
    return lines[0]


def test_a_rank_that_hangs_is_named_with_its_place_and_the_collective(tmp_path: Path) -> None:
    done = run(*LATE, f"--job.dump_folder={tmp_path}", "--loss.name=hangs_on_last_rank", NGPU="2")
    assert done.returncode == 1
    traces = tmp_path / "comm_traces"
    found = re.fullmatch(
        r"error: \[rank 0\] (\w+) #(\d+) over all = ranks \(0, 1\) in step 3, forward/backward has failed: rank 1 \("
        + HOME
        + r"\) has not reached it; it is in step 3, forward/backward, at tests/trainer/broken_losses\.py:\d+ in"
        r" __call__, after \w+ #(\d+) \(RuntimeError: Timed out waiting 3000ms for (send|recv) operation to complete\);"
        r" recordings of the ranks: " + re.escape(str(traces)),
        told(done.stderr),
    )
    assert found, done.stderr
    assert int(found[2]) == int(found[4]) + 1
    assert "Traceback" not in done.stderr
    recordings = [pickle.loads((traces / f"rank_{rank}").read_bytes()) for rank in range(2)]
    assert [recording["pg_config"]["0"]["ranks"] for recording in recordings] == ["[0, 1]"] * 2
    last = [recording["entries"][-1] for recording in recordings]
    assert [entry["collective_seq_id"] for entry in last] == [int(found[2]), int(found[4])]
    assert last[0]["profiling_name"] == f"gloo:{found[1]}"
    assert any("trainer/trainer.py" in frame["filename"] for frame in last[0]["frames"])


@pytest.mark.parametrize(
    ("ranks", "rank"),
    [(2, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 0), (3, 0), (3, 1), (3, 2)))],
)
def test_a_stopped_rank_is_named_within_a_second_of_the_timeout(ranks: int, rank: int, tmp_path: Path) -> None:
    stall = tmp_path / "stall"
    line, seconds, rest = first_error(
        ranks, stall, *STALLING, f"--job.dump_folder={tmp_path}", "--loss.name=stops", rank=rank
    )
    found = re.fullmatch(
        r"error: \[rank (\d)\] (\w+) #\d+ over all = ranks \("
        + ", ".join(map(str, range(ranks)))
        + rf"\) in step 3, (forward/backward|optimizer) has failed: rank {rank} \({HOME}\) does not answer; it is in"
        r" step 3, \3 or before \(RuntimeError: .*\); recordings of the ranks: \S+",
        line,
    )
    assert found, line
    assert found[4] == stall.read_text().split()[0]
    assert seconds < 2 + 1
    assert LAST.fullmatch(rest.splitlines()[-1]), rest
    assert rest.count("does not answer") == 0


@pytest.mark.slow
def test_a_rank_that_sleeps_over_its_data_is_named_with_line_and_phase(tmp_path: Path) -> None:
    arguments = (*STALLING, f"--job.dump_folder={tmp_path}", "--training.dataset=sleeps")
    line, seconds, _ = first_error(2, tmp_path / "stall", *arguments, rank=1)
    assert re.search(
        rf": rank 1 \({HOME}\) has not reached it; it is in step 3, data, at tests/trainer/stalling\.py:\d+ in row,",
        line,
    ), line
    assert seconds < 2 + 1


@pytest.mark.slow
def test_a_stopped_rank_that_hosts_the_store_is_told_by_all_others(tmp_path: Path) -> None:
    """As under a launcher that is not torchrun: nobody can be asked then."""
    stall = tmp_path / "stall"
    usual = {**meeting_point(), "WORLD_SIZE": "3", "STALL_RANK": "0", "STALL_FILE": str(stall)}
    options = ("--training.local_batch_size=4", "--loss.name=stops", f"--job.dump_folder={tmp_path}")
    argv = [sys.executable, "-m", "trainer", *STALLING, *options]
    environs = [environment(**usual, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(3)]
    first, *others = [subprocess.Popen(argv, cwd=ROOT, env=e, stderr=subprocess.PIPE, text=True) for e in environs]
    told = [other.communicate(timeout=100)[1].splitlines()[-1] for other in others]
    seconds = time.time() - float(stall.read_text().split()[1])
    first.kill()
    first.communicate()
    who = "the process that hosts the store of the ranks, rank 0 or its launcher on 127.0.0.1, does not answer"
    for line in told:
        assert line.startswith("error: communication has failed in step 3, forward/backward (RuntimeError: "), line
        assert line.endswith(f"): {who}"), line
    assert seconds < 2 + 1.5  # the processes' end is in it


def first_error(ranks: int, stall: Path, *arguments: str, rank: int) -> tuple[str, float, str]:
    """Run a job one of whose ranks stalls: the first error line, how long after the stall it came, what came after."""
    environ = environment(NGPU=str(ranks), STALL_RANK=str(rank), STALL_FILE=str(stall))
    argv = [SCRIPT, *arguments, f"--training.local_batch_size={12 // ranks}"]
    with subprocess.Popen(argv, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        line = next(line for line in job.stderr if line.startswith("error: "))
        assert stall.exists(), line
        pid, began = stall.read_text().split()
        seconds = time.time() - float(began)
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)  # the launcher would wait for it for half a minute
        rest = job.stderr.read()
    assert job.returncode == 1, rest
    return line.rstrip("\n"), seconds, rest


def test_a_rank_that_fails_is_told_rather_than_what_follows_from_it(tmp_path: Path) -> None:
    done = run(*LATE, f"--job.dump_folder={tmp_path}", "--loss.name=fails_on_last_rank", NGPU="2")
    assert done.returncode == 1
    assert "error: [rank 1] Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("LookupError: no such word")


def test_a_job_in_order_records_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    outcomes = launch(2, tmp_path, "--training.steps=1")
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert not (tmp_path / "comm_traces").exists()


def answer(failed: str | None = None, **entered: list[tuple[int, str]]) -> Answer:
    return {"standing": "in step 7, data", "where": "a.py:1 in f", "failed": failed, "entered": entered}


@pytest.mark.parametrize(
    ("answers", "entry", "told"),
    [
        ({1: answer(tp=[(1, "all_gather")], dp=[(4, "all_reduce")])}, None, {}),
        (
            {1: answer(tp=[(1, "all_gather")], dp=[(3, "all_reduce")])},
            ("dp", 4, "all_reduce"),
            {1: "has not reached it; it is in step 7, data, at a.py:1 in f, after all_reduce #3"},
        ),
        (
            {1: answer(dp=[(4, "all_reduce")])},
            ("tp", 1, "all_gather"),
            {1: "has not reached it; it is in step 7, data, at a.py:1 in f"},
        ),
        (
            {1: answer(tp=[(1, "all_gather")], dp=[(4, "barrier"), (5, "barrier")])},
            ("dp", 4, "all_reduce"),
            {1: "has entered barrier #4 instead; it is in step 7, data, at a.py:1 in f"},
        ),
        (
            {1: answer("ValueError: no", tp=[(1, "all_gather")])},
            ("dp", 4, "all_reduce"),
            {1: "has not reached it; it failed in step 7, data: ValueError: no"},
        ),
        ({}, ("dp", 4, "all_reduce"), {}),
    ],
)
def test_who_did_not_come(answers: dict[int, Answer], entry: tuple[str, int, str] | None, told: dict[int, str]) -> None:
    mine = [("tp", 1, "all_gather"), ("dp", 4, "all_reduce")]
    assert stalled(mine, {"tp": [1], "dp": [1]}, answers) == ((entry, told) if entry else None)
