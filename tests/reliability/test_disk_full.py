"""A disk that is full for a while: the job goes on, says so, keeps what it has saved, and saves again once there is
space. One that stays full ends it, at the number of failed saves that was asked for.

Full for real: files of more than some kilobytes cannot be written (RLIMIT_FSIZE), or the whole file system is (tmpfs,
where it may be mounted), so that reports cannot be written either.
"""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from components.metrics.jsonl import JsonlSink
from components.runtime.errors import UserError
from tests.reliability.harness import Case, Ended, run
from tests.reliability.harness_jobs import SAVING, check_folder, job, put_foreign, saved_steps
from tests.trainer.runs import facts, records
from trainer.command import main
from trainer.trainer import Trainer

STEPS = 7
LIMIT = 100_000  # bytes; a checkpoint's tensors take 1.5 MB
DISK = 12 << 20


class Told(NamedTuple):
    """What the process of a job found."""

    code: int
    saved: dict[int, list[int]]
    """After each step: the steps that are saved."""


class Space:
    """The space for a job's files, which can be taken away and given back."""

    def __init__(self, ballast: Path | None) -> None:
        self.ballast = ballast

    def take(self) -> None:
        if self.ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
            return
        file = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
        try:
            while os.write(file, bytes(4096)):
                pass
        except OSError:
            os.close(file)

    def give(self) -> None:
        if self.ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif self.ballast.exists():
            self.ballast.unlink()


def job_without_space(argv: list[str], root: Path, first: int, last: int, ballast: Path | None) -> Told:
    """A job that has no space from the end of step `first` to that of step `last`."""
    space, saved, real = Space(ballast), dict[int, list[int]](), Trainer.finish_step

    def finish_step(trainer: Trainer, *arguments: Any) -> None:
        step = trainer.progress.step
        if step == first:
            space.take()
        elif step == last + 1:
            space.give()
        try:
            real(trainer, *arguments)
        finally:
            trainer.persistence.saver.wait()
            saved[step] = saved_steps(root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish_step", finish_step)
        try:
            return Told(main(argv, os.environ), saved)
        finally:
            space.give()


def arguments(folder: Path, mode: str) -> list[str]:
    async_mode, keep = f"--checkpoint.async_mode={mode}", "--checkpoint.keep_latest_k=2"
    return [*SAVING, f"--training.steps={STEPS}", async_mode, keep, f"--job.dump_folder={folder}"]


def start(folder: Path, mode: str, first: int, last: int, ballast: Path | None = None) -> Ended:
    root = folder / "checkpoint"
    ended = run(Case(job_without_space, (arguments(folder, mode), root, first, last, ballast), root))
    assert ended.code == 0, ended.log
    return ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What the steps of the job come to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(Case(job, (arguments(folder, "disabled"),), folder / "checkpoint"))
    assert ended.value == 0, ended.log
    return [facts(record) for record in records(folder)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for five checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_it_goes_on_and_saves_again_once_there_is_space(
    mode: str, tmp_path: Path, whole: list[dict[str, float]]
) -> None:
    told = start(tmp_path, mode, 3, 4)
    assert told.value.code == 0, told.log
    assert told.value.saved == {1: [1], 2: [1, 2], 3: [1, 2], 4: [1, 2], 5: [2, 5], 6: [5, 6], 7: [6, 7]}
    assert [facts(record) for record in records(tmp_path)] == whole
    reason = f"in '{tmp_path}/checkpoint': File too large: free space there, or lower checkpoint.keep_latest_k"
    for number, step in ((1, 3), (2, 4)):
        assert (
            f"cannot save step-{step} {reason}; earlier checkpoints are as they were;"
            f" {number} of 3 failed saves in a row (checkpoint.max_failed_saves)\n"
        ) in told.log
    assert told.log.count("cannot save") == 2


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_it_stops_at_the_number_of_failed_saves_and_comes_back(
    mode: str, tmp_path: Path, whole: list[dict[str, float]]
) -> None:
    told = start(tmp_path, mode, 3, STEPS)
    assert told.value.code not in (0, 75)
    assert told.value.saved[max(told.value.saved)] == [1, 2]
    assert max(told.value.saved) in ((5,) if mode == "disabled" else (5, 6))
    assert "error: checkpoint.max_failed_saves = 3: the last 3 saves have failed: cannot save step-3 in '" in told.log
    check_latest(tmp_path, 2)
    again = run(Case(job, (arguments(tmp_path, mode),), tmp_path / "checkpoint"))
    assert again.value == 0, again.log
    assert "loaded step-2\n" in again.log
    assert [facts(record) for record in records(tmp_path)] == whole


def check_latest(folder: Path, step: int) -> None:
    put_foreign(folder / "checkpoint")
    check_folder(folder / "checkpoint", step)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_file_system_without_a_free_block(mode: str, disk: Path, whole: list[dict[str, float]]) -> None:
    """Neither checkpoints nor reports can be written; the reports follow once there is space."""
    folder = disk / "job"
    told = start(folder, mode, 3, 4, disk / "ballast")
    assert told.value.code == 0, told.log
    assert told.value.saved == {1: [1], 2: [1, 2], 3: [1, 2], 4: [1, 2], 5: [2, 5], 6: [5, 6], 7: [6, 7]}
    assert "No space left on device: free space there, or lower checkpoint.keep_latest_k" in told.log
    assert [facts(record) for record in records(folder)] == whole


def test_reports_wait_for_space(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also a line of which only the beginning had room."""
    space, path = Space(disk / "ballast"), disk / "metrics.jsonl"
    sink = JsonlSink(path, None)
    sink.note({"event": "before", "step": 0})
    space.take()
    for step in range(1, 100):
        sink.note({"event": "while", "step": step, "text": "x" * 100})
    assert path.stat().st_size == 4096
    space.give()
    sink.note({"event": "after", "step": 100})
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(101)]
    assert caplog.messages == [f"{path}: No space left on device: reports wait in memory until there is room"]


def test_reports_that_never_found_room_are_an_error(disk: Path) -> None:
    space, path = Space(disk / "ballast"), disk / "metrics.jsonl"
    sink = JsonlSink(path, None)
    space.take()
    sink.note({"event": "while", "text": "x" * 5000})
    with pytest.raises(UserError) as caught:
        sink.close()
    assert str(caught.value) == f"{path}: cannot be written: No space left on device; make room and run again"
