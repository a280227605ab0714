"""SIGTERM, SIGINT, SIGUSR1 and the clock, in each phase of a job: all ranks agree, and what is left is a valid
checkpoint from which the job goes on as if nothing had been."""

import functools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.checkpoint.checkpointer import Checkpointer
from tests.reliability.interrupted import Ended, Shot, interrupt
from tests.trainer.runs import facts, records

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
VALIDATING = ("--validation.enable", "--validation.freq=2", "--validation.steps=1", "--validation.dataset=c4_test")
HELD = ("held0",)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, float]]]:
    """Ranks → what the steps of an uninterrupted job come to."""

    @functools.cache
    def run(ranks: int) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp("whole")
        assert codes(interrupt(ranks, folder, ())) == [0] * ranks
        found = [facts(record) for record in records(folder)]
        assert len(found) == 6
        return found

    return run


def codes(ended: list[Ended]) -> list[int]:
    return [rank.code for rank in ended]


def said(ended: list[Ended]) -> str:
    return "".join(rank.err for rank in ended)


def events(folder: Path) -> list[dict[str, Any]]:
    """What is recorded besides the steps and the saves that training itself did."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event", "saved") != "saved"]


def saved(folder: Path) -> list[int]:
    """Steps with a checkpoint that is whole to its last byte."""
    store = Checkpointer(folder / "checkpoint", keep_latest_k=0, group=None)
    return [step for step in store.steps() if not store.verify(step)]


ASYNC = ("--checkpoint.interval=2", "--checkpoint.async_mode=async")
PHASES = {
    # phase: where the last rank stands and for how many seconds, the arguments, the steps that are saved
    "compile": ("compile 1 inf", ("--compile.enable", "--compile.backend=standing"), [0]),
    "first step": ("compute 1 inf", (), [0]),
    "forward": ("compute 3 inf", (), [2]),
    "data": ("data 4 inf", (), [3]),
    "validation": ("validation 2 inf", VALIDATING, [4]),
    "optimizer": ("step 3 1", (), [3]),
    "save": ("save 1 1", ("--checkpoint.interval=3",), [3]),
    "in backward": ("compute 3 1", (), [3]),
    "background save": ("save 1 2 {rank} data 4 inf", ASYNC, [2, 3]),
}


def stop_and_go_on(phase: str, ranks: int, folder: Path, *arguments: str) -> None:
    """Stop the job in that phase, look at what it leaves, and let it go on to its end."""
    hold, more, steps = PHASES[phase]
    last = ranks - 1
    marks = tuple(f"{last}.{word}" for word in hold.split() if word.isalpha() and word != "inf")
    shot = Shot(TERM, tuple(range(ranks)), marks, delay=0.2)
    where = f"{hold.format(rank=last)} {last}"
    ended = interrupt(ranks, folder, (*arguments, *more), [shot], HOLD=where)
    assert codes(ended) == [75] * ranks, said(ended)
    assert saved(folder) == steps
    assert events(folder)[-1] == {"event": "stopped", "step": steps[-1], "reason": "SIGTERM"}
    assert [record["step"] for record in records(folder)] == list(range(1, steps[-1] + 1))
    assert "Traceback" not in said(ended)
    assert "error" not in said(ended)
    assert codes(interrupt(ranks, folder, arguments)) == [0] * ranks


@pytest.mark.parametrize(
    ("phase", "ranks"),
    [
        pytest.param("compile", 1, marks=SLOW),
        pytest.param("first step", 1, marks=SLOW),
        pytest.param("forward", 1, marks=SLOW),
        pytest.param("data", 1, marks=SLOW),
        ("validation", 1),
        pytest.param("optimizer", 1, marks=SLOW),
        pytest.param("save", 1, marks=SLOW),
        pytest.param("background save", 1, marks=SLOW),
        pytest.param("compile", 2, marks=SLOW),
        pytest.param("first step", 2, marks=SLOW),
        pytest.param("forward", 2, marks=SLOW),
        pytest.param("data", 2, marks=SLOW),
        pytest.param("validation", 2, marks=SLOW),
        pytest.param("optimizer", 2, marks=SLOW),
        pytest.param("save", 2, marks=SLOW),
        ("background save", 2),
    ],
)
def test_sigterm_in_each_phase_ends_in_a_checkpoint(
    phase: str, ranks: int, whole: Callable[[int], list[dict[str, float]]], tmp_path: Path
) -> None:
    """The last rank stands still; where there is another, that one waits for it in a collective."""
    stop_and_go_on(phase, ranks, tmp_path)
    assert [facts(record) for record in records(tmp_path)] == whole(ranks)


@SLOW
def test_a_step_in_backward_is_finished_first(tmp_path: Path) -> None:
    early = ("--optimizer.early_step_in_backward", "--training.max_norm=inf")
    assert codes(interrupt(1, tmp_path / "whole", early)) == [0]
    stop_and_go_on("in backward", 1, tmp_path / "run", *early)
    assert [facts(r) for r in records(tmp_path / "run")] == [facts(r) for r in records(tmp_path / "whole")]


def test_one_rank_is_told_and_all_stop(tmp_path: Path) -> None:
    ended = interrupt(2, tmp_path, (), [Shot(INT, (1,), ("held1",))], HOLD="data 3 inf 1")
    assert codes(ended) == [75, 75], said(ended)
    assert saved(tmp_path) == [2]
    assert events(tmp_path) == [{"event": "stopped", "step": 2, "reason": "SIGINT"}]


def test_sigusr1_saves_and_goes_on_and_twice_is_once(
    whole: Callable[[int], list[dict[str, float]]], tmp_path: Path
) -> None:
    """All ranks get it twice, as from a scheduler, while the last one waits for data."""
    shots = [Shot(USR1, (0, 1), ("held1",)), Shot(USR1, (1, 0))]
    ended = interrupt(2, tmp_path, (), shots, HOLD="data 4 1 1")
    assert codes(ended) == [0, 0], said(ended)
    assert saved(tmp_path) == [3, 6]
    found = events(tmp_path)
    assert {json.dumps(event) for event in found} == {'{"event": "saved_on_signal", "step": 3, "reason": "SIGUSR1"}'}
    assert [facts(record) for record in records(tmp_path)] == whole(2)


def test_sigterm_while_sigusr1_is_saving(tmp_path: Path) -> None:
    shots = [Shot(USR1, (0,), ("0.data",)), Shot(TERM, (0,), HELD, delay=0.3)]
    ended = interrupt(1, tmp_path, (), shots, HOLD="save 1 1 0 data 3 inf 0")
    assert codes(ended) == [75], said(ended)
    assert saved(tmp_path) == [2]
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [("saved_on_signal", 2), ("stopped", 2)]


@SLOW
def test_a_second_sigterm_is_an_echo_at_first_and_then_the_end(tmp_path: Path) -> None:
    """The save takes for ever: the second signal changes nothing, the third ends the job at once."""
    shots = [Shot(TERM, (0,), HELD), Shot(TERM, (0,), delay=0.5), Shot(INT, (0,), delay=3)]
    begin = time.monotonic()
    ended = interrupt(1, tmp_path, ("--checkpoint.interval=2",), shots, HOLD="save 1 inf 0")
    assert codes(ended) == [128 + INT], said(ended)
    assert ended[0].err.splitlines()[-1] == "[rank 0] error: SIGINT again: ending at once"
    assert ended[0].seconds < 1
    assert time.monotonic() - begin > 3.5
    assert saved(tmp_path) == []


@SLOW
def test_what_is_not_saved_within_the_grace_is_given_up_and_the_late_rank_named(tmp_path: Path) -> None:
    hold = {"HOLD": "step 3 inf 1"}
    ended = interrupt(2, tmp_path, ("--checkpoint.grace_seconds=2",), [Shot(TERM, (0,), ("held1",))], **hold)
    assert codes(ended) == [1, 1], said(ended)
    assert 1.5 < ended[0].seconds < 4
    assert saved(tmp_path) == []
    late = (
        "not saved within checkpoint.grace_seconds = 2: this rank waits for its training thread, in step 3, optimizer"
    )
    assert f"[rank 1] error: {late}\n" in ended[1].err


def test_a_save_that_fails_on_a_stop_is_a_failure(tmp_path: Path) -> None:
    ended = interrupt(2, tmp_path, (), [Shot(TERM, (0, 1), ("1.data",))], HOLD="fail 1 0 all data 3 inf 1")
    assert codes(ended) == [1, 1], said(ended)
    what = "error: SIGTERM: nothing is saved: cannot save: no space left, says the test"
    assert [rank.err.splitlines()[-1] for rank in ended] == [f"[rank 0] {what}", f"[rank 1] {what}"]


@SLOW
def test_a_training_that_fails_while_it_is_stopped_says_nothing(tmp_path: Path) -> None:
    ended = interrupt(1, tmp_path, (), [Shot(TERM, (0,), ("0.error",), delay=0)], HOLD="save 1 1 0 error 3 0.5 0")
    assert codes(ended) == [75], said(ended)
    assert "Traceback" not in said(ended)
    assert saved(tmp_path) == [2]


def test_an_update_that_fails_half_way_is_never_saved(tmp_path: Path) -> None:
    """The training thread fails inside a section, while the stop waits for it."""
    ended = interrupt(1, tmp_path, (), [Shot(TERM, (0,), HELD)], HOLD="torn 3 1 0")
    assert codes(ended) == [1], said(ended)
    assert saved(tmp_path) == []
    line = "[rank 0] error: SIGTERM: nothing is saved: the training thread has failed in step 3, optimizer"
    assert ended[0].err.splitlines()[-1] == line


@SLOW
def test_a_signal_after_the_last_step_changes_nothing(tmp_path: Path) -> None:
    ended = interrupt(1, tmp_path, (), [Shot(TERM, (0,), HELD)], HOLD="close 1 1 0")
    assert codes(ended) == [0], said(ended)
    assert saved(tmp_path) == [6]
    assert events(tmp_path) == []


def test_a_signal_while_a_job_that_is_done_is_taken_down_changes_nothing(tmp_path: Path) -> None:
    """All is closed, the process is about to leave: one rank that died of it would be the failure of a finished job."""
    ended = interrupt(2, tmp_path, (), [Shot(TERM, (0, 1), ("0.leave", "1.leave"))], HOLD="leave 2 0.5 all")
    assert codes(ended) == [0, 0], said(ended)
    assert saved(tmp_path) == [6]


@SLOW
def test_a_stop_in_the_last_save_finds_nothing_left_to_do(tmp_path: Path) -> None:
    ended = interrupt(1, tmp_path, (), [Shot(TERM, (0,), HELD)], HOLD="save 1 1 0")
    assert codes(ended) == [0], said(ended)
    assert saved(tmp_path) == [6]
    assert len(records(tmp_path)) == 6


def test_without_checkpoints_a_signal_keeps_its_meaning(tmp_path: Path) -> None:
    ended = interrupt(1, tmp_path, ("--checkpoint.load_only",), [Shot(TERM, (0,), HELD)], HOLD="data 3 inf 0")
    assert codes(ended) == [-TERM], said(ended)


@SLOW
def test_worker_processes_leave_signals_to_the_rank_and_end_with_it(tmp_path: Path) -> None:
    """SIGUSR1 and SIGTERM reach each process of the job, as from a scheduler: one save, one stop, nobody left."""
    shots = [Shot(USR1, (0,), ("0.data",), tree=True), Shot(TERM, (0,), ("checkpoint/step-2",), tree=True)]
    workers = ("--training.dataloader.num_workers=2",)
    [ended] = interrupt(1, tmp_path, workers, shots, HOLD="data 3 inf 0")
    assert ended.code == 75, ended.err
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [("saved_on_signal", 2), ("stopped", 2)]
    assert len(ended.children) == 2
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in ended.children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in ended.children if Path(f"/proc/{pid}").exists()]
