"""A rank that hangs, fails or dies while the others wait for it: the job says which, where, and in which collective."""

import pickle
import re
from pathlib import Path

import pytest

from components.runtime.witness import Answer, stalled
from tests.trainer.runs import launch
from tests.trainer.test_launch import QUIET, run

LATE = (
    *QUIET,
    "--experimental.custom_import=tests.trainer.broken_losses",
    "--training.local_batch_size=6",
    "--comm.train_timeout_seconds=3",
)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_rank_that_hangs_is_named_with_its_place_and_the_collective(tmp_path: Path) -> None:
    done = run(*LATE, f"--job.dump_folder={tmp_path}", "--loss.name=hangs_on_last_rank", NGPU="2")
    assert done.returncode == 1
    traces = tmp_path / "comm_traces"
    found = re.fullmatch(
        r"error: \[rank 0\] (\w+) #(\d+) over all = ranks \(0, 1\) in step 3 has failed: rank 1 has not reached it; it"
        r" is in step 3, at tests/trainer/broken_losses\.py:\d+ in __call__, after \w+ #(\d+)"
        r" \(RuntimeError: Timed out waiting 3000ms for (send|recv) operation to complete\); recordings of the ranks: "
        + re.escape(str(traces)),
        last_line(done.stderr),
    )
    assert found, done.stderr
    assert int(found[2]) == int(found[3]) + 1
    assert "Traceback" not in done.stderr
    recordings = [pickle.loads((traces / f"rank_{rank}").read_bytes()) for rank in range(2)]
    assert [recording["pg_config"]["0"]["ranks"] for recording in recordings] == ["[0, 1]"] * 2
    last = [recording["entries"][-1] for recording in recordings]
    assert [entry["collective_seq_id"] for entry in last] == [int(found[2]), int(found[3])]
    assert last[0]["profiling_name"] == f"gloo:{found[1]}"
    assert any("trainer/trainer.py" in frame["filename"] for frame in last[0]["frames"])


def test_a_rank_that_fails_is_told_rather_than_what_follows_from_it(tmp_path: Path) -> None:
    done = run(*LATE, f"--job.dump_folder={tmp_path}", "--loss.name=fails_on_last_rank", NGPU="2")
    assert done.returncode == 1
    assert "error: [rank 1] Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("LookupError: no such word")


@pytest.mark.slow
def test_a_rank_that_does_not_even_answer(tmp_path: Path) -> None:
    done = run(*LATE, f"--job.dump_folder={tmp_path}", "--loss.name=stops_on_last_rank", NGPU="2")
    assert done.returncode == 1
    assert "over all = ranks (0, 1) in step 3 has failed: rank 1 does not answer (RuntimeError: " in last_line(
        done.stderr
    )


def test_a_job_in_order_records_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    outcomes = launch(2, tmp_path, "--training.steps=1")
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert not (tmp_path / "comm_traces").exists()


def answer(failed: str | None = None, **entered: list[tuple[int, str]]) -> Answer:
    return {"step": 7, "where": "a.py:1 in f", "failed": failed, "entered": entered}


@pytest.mark.parametrize(
    ("answers", "entry", "told"),
    [
        ({1: answer(tp=[(1, "all_gather")], dp=[(4, "all_reduce")])}, None, {}),
        (
            {1: answer(tp=[(1, "all_gather")], dp=[(3, "all_reduce")])},
            ("dp", 4, "all_reduce"),
            {1: "has not reached it; it is in step 7, at a.py:1 in f, after all_reduce #3"},
        ),
        (
            {1: answer(dp=[(4, "all_reduce")])},
            ("tp", 1, "all_gather"),
            {1: "has not reached it; it is in step 7, at a.py:1 in f"},
        ),
        (
            {1: answer(tp=[(1, "all_gather")], dp=[(4, "barrier"), (5, "barrier")])},
            ("dp", 4, "all_reduce"),
            {1: "has entered barrier #4 instead; it is in step 7, at a.py:1 in f"},
        ),
        (
            {1: answer("ValueError: no", tp=[(1, "all_gather")])},
            ("dp", 4, "all_reduce"),
            {1: "has not reached it; it failed in step 7: ValueError: no"},
        ),
        ({}, ("dp", 4, "all_reduce"), {1: "does not answer"}),
    ],
)
def test_who_did_not_come(answers: dict[int, Answer], entry: tuple[str, int, str] | None, told: dict[int, str]) -> None:
    mine = [("tp", 1, "all_gather"), ("dp", 4, "all_reduce")]
    assert stalled(mine, {"tp": [1], "dp": [1]}, answers) == ((entry, told) if entry else None)
