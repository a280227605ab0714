"""Every call of the commit protocol fails once, or is the last thing that a process does.

The calls are counted in an undisturbed save, at the level of libc, so that those of torch are among them. The save is
that of step 2, which also deletes step 1 (`keep_latest_k = 1`): writing, renaming and deleting all happen in it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import checkpointer, loads, save
from tests.reliability.harness import Blow, Call, Case, Ended, Mode, Op, Phase, committed, run
from tests.reliability.harness_figures import record

KILLED = -9


def save_second(root: Path) -> str:
    """What a run does: prepare, save step 2, delete step 1. What it raised, if it did."""
    try:
        checkpointer(root, keep=1).prepare()
        save(root, 2, keep=1)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with step 1 in it."""
    root = tmp_path_factory.mktemp("before") / "checkpoint"
    save(root, 1)
    return root


class Trial:
    """The same save, again and again from the same beginning."""

    def __init__(self, before: Path, root: Path) -> None:
        self.before, self.root = before, root
        ended = self.meet(Blow())
        assert (ended.code, ended.value) == (0, "")
        assert committed(ended.calls) == [2]
        self.calls = ended.calls

    def meet(self, blow: Blow) -> Ended:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)
        return run(Case(save_second, (self.root,), self.root, blow))

    def numbers(self, every: bool) -> Iterator[tuple[int, Call]]:
        """Calls to meet; unless `every`, only those that change something or open it."""
        for number, call in enumerate(self.calls):
            if every or call.op not in (Op.STAT, Op.OPENDIR):
                yield number, call

    def comes_back(self) -> None:
        """The next run finds the folder as good as any: it saves, and nothing unfinished stays."""
        assert save_second(self.root) == ""
        assert loads(self.root, 2)
        assert checkpointer(self.root).latest() == 2
        assert {*os.listdir(self.root)} <= {"step-1", "step-2"}


@pytest.fixture
def trial(before: Path, tmp_path: Path) -> Trial:
    return Trial(before, tmp_path / "checkpoint")


def check_failure(trial: Trial, blow: Blow, call: Call) -> bool:
    """A save that failed has left what was there; one that did not is whole. Whether it failed."""
    ended = trial.meet(blow)
    assert ended.code == 0, f"{call}: {ended.log}"  # no other error than CheckpointError
    there = (trial.root / "step-2").exists()
    # A disk that is dead from the last sync on does not let the new name be taken back; what bears it is whole.
    stuck = blow.mode == Mode.FAIL_ON and call.phase == Phase.RENAME and call.op != Op.RENAME
    assert there is not bool(ended.value) or (there and stuck), (call, ended.value)
    assert checkpointer(trial.root).latest() == (2 if there else 1), (call, ended.value)
    assert all(loads(trial.root, step) for step in ([1] if ended.value else []) + ([2] if there else []))
    return bool(ended.value)


def check_kill(trial: Trial, blow: Blow, call: Call) -> int:
    """The latest checkpoint is the one that had been committed. Which it is."""
    ended = trial.meet(blow)
    assert ended.code == KILLED, f"{call}: {ended.log}"
    latest = 2 if (trial.root / "step-2").exists() else 1
    assert latest == 2 or committed(ended.calls) == []
    assert checkpointer(trial.root).latest() == latest
    assert loads(trial.root, latest)
    return latest


def fail_each(trial: Trial, mode: Mode, error: int, every: bool) -> dict[Op, int]:
    """Let each call fail; how many of each kind."""
    counts: dict[Op, int] = dict.fromkeys(Op, 0)
    failed = []
    for number, call in trial.numbers(every):
        failed.append(check_failure(trial, Blow(mode, number, error=error), call))
        trial.comes_back()
        counts[call.op] += 1
    assert {*failed} == {True, False}  # a deletion that fails is no failed save
    return counts


def kill_each(trial: Trial, mode: Mode, every: bool) -> dict[Op, int]:
    """Kill at each call; how many of each kind."""
    counts: dict[Op, int] = dict.fromkeys(Op, 0)
    latest = []
    for number, call in trial.numbers(every):
        latest.append(check_kill(trial, Blow(mode, number), call))
        trial.comes_back()
        counts[call.op] += 1
    assert latest == sorted(latest)
    assert {*latest} == {1, 2}
    return counts


def test_the_undisturbed_save_makes_each_kind_of_call(trial: Trial) -> None:
    made = {call.op for call in trial.calls}
    assert {Op.OPEN, Op.CREATE, Op.WRITE, Op.FSYNC, Op.CLOSE, Op.RENAME, Op.MKDIR, Op.UNLINK, Op.RMDIR} <= made
    assert {call.phase for call in trial.calls} == {*Phase}


def test_each_call_fails_once(trial: Trial) -> None:
    assert sum(fail_each(trial, Mode.FAIL, errno.ENOSPC, every=False).values()) > 40


def test_a_kill_after_each_call(trial: Trial) -> None:
    assert sum(kill_each(trial, Mode.KILL_AFTER, every=False).values()) > 40


@pytest.mark.slow
def test_each_call_fails_with_each_error_once_and_for_good(trial: Trial) -> None:
    once = [fail_each(trial, Mode.FAIL, error, every=True) for error in (errno.EIO, errno.ENOSPC)]
    for error in (errno.EIO, errno.ENOSPC):  # from this call on nothing can be written any more
        fail_each(trial, Mode.FAIL_ON, error, every=True)
    kinds = ", ".join(f"{count} {op.name.lower()}" for op, count in once[0].items() if count)
    found = f"{len(trial.calls)} calls ({kinds}), each with EIO, with ENOSPC, and failing from there on"
    record("faults", f"{found}: 0 checkpoints lost, 0 halves taken for wholes")


@pytest.mark.slow
def test_a_kill_before_within_and_after_each_call(trial: Trial) -> None:
    modes = (Mode.KILL_BEFORE, Mode.KILL_WITHIN, Mode.KILL_AFTER)
    kills = sum(sum(kill_each(trial, mode, every=True).values()) for mode in modes)
    record("kills at each call", f"{kills} kills before, within and after {len(trial.calls)} calls: 0 unloadable")
