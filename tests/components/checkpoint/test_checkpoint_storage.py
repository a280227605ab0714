"""The commit protocol under failures and kills, and retention."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from components.checkpoint import local
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.local import LocalStorage
from components.checkpoint.manifest import MANIFEST
from components.checkpoint.storage import step_of
from components.runtime.durable import sync_folder
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, STATE, checkpointer, loads, save, tensors

CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "scandir", "listdir")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so nothing is tidied up."""


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, failure: BaseException) -> Callable[[], bool]:
    """Let call `number` of all the system calls below fail, once; the function says whether it came to that."""
    count = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == number + 1:
                raise failure
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return lambda: count > number


def moments(root: Path, failure: BaseException, keep: int) -> Iterator[tuple[int, bool]]:
    """Save step 2 after step 1 with a failure at the first, second, … system call; (call, whether save raised)."""
    number, came, before = 0, True, root.with_name("before")
    save(before, 1)
    while came:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            reached = fail_at(patch, number, failure)
            try:
                save(root, 2, keep=keep)
            except (Killed, CheckpointError):
                raised = True
            came = reached()
        if came:
            yield number, raised
        number += 1


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    found = []
    for _, raised in moments(tmp_path / "c", Killed(), keep=1):
        assert raised
        run = checkpointer(tmp_path / "c")
        run.prepare()
        latest = run.latest()
        assert latest is not None
        assert loads(tmp_path / "c", latest)
        assert set(os.listdir(tmp_path / "c")) <= {"step-1", "step-2"}
        found.append(latest)
        save(tmp_path / "c", 2)
        assert loads(tmp_path / "c", 2)
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert len(found) > 15


def test_a_failure_at_any_moment_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    saved = []
    for _, raised in moments(tmp_path / "c", OSError(28, "No space left on device"), keep=1):
        run = checkpointer(tmp_path / "c")
        latest = 1 if raised else 2
        assert run.latest() == latest
        assert loads(tmp_path / "c", latest)
        assert raised is not (tmp_path / "c/step-2").exists()
        saved.append(not raised)
        run.prepare()
        assert set(os.listdir(tmp_path / "c")) <= {"step-1", "step-2"}
    assert set(saved) == {True, False}


def test_the_message_of_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local.os, "rename", full)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    assert str(caught.value) == (
        f"cannot save step-2 in '{tmp_path}': No space left on device: free space there, "
        "or lower checkpoint.keep_latest_k"
    )
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_full_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    big = {"model.w": torch.zeros(1_000_000)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpointer(tmp_path).save(2, big, STATE, JOB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(caught.value) == (
        f"cannot save step-2 in '{tmp_path}': File too large: free space there, or lower checkpoint.keep_latest_k"
    )
    assert os.listdir(tmp_path) == ["step-1"]
    assert loads(tmp_path, 1)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    root = tmp_path / "out" / "checkpoint"
    for name in (root, tmp_path / "out"):
        with pytest.raises(CheckpointError) as caught:
            checkpointer(name).prepare()
        assert str(caught.value).startswith(f"checkpoint.folder: '{name}' cannot be written to: ")
        assert str(caught.value).endswith(": give a folder that can be written to (for a job: job.dump_folder)")
        assert "\n" not in str(caught.value)
    assert checkpointer(root).steps() == []
    assert checkpointer(root).latest() is None


def test_start_removes_only_what_killed_runs_left(tmp_path: Path) -> None:
    ours = [f".tmp-step-10-{'0a' * 8}", f".del-step-5-{'ff' * 8}"]
    others = [".tmp-step-10-xyz", ".tmp-step-010-" + "0a" * 8, "tmp-step-1-" + "0a" * 8, "step-5.bak", ".tmp"]
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / f".tmp-step-3-{'00' * 8}").write_text("a file of that name is not ours")
    checkpointer(tmp_path).prepare()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f".tmp-step-3-{'00' * 8}"])


def test_names_are_matched_whole(tmp_path: Path) -> None:
    save(tmp_path, 10, 100)
    for name in ("step-10.bak", "step-05", "xstep-5", "step-5x", "step-", "step-1_0", "step-+5", "step-٣", "step-7\n"):
        shutil.copytree(tmp_path / "step-10", tmp_path / name)
        assert step_of(name) is None
    assert checkpointer(tmp_path).steps() == [10, 100]
    assert checkpointer(tmp_path).verify(1) == [
        "checkpoint step-1: no manifest.json in it: not a checkpoint of Espalier, or one that was never finished"
    ]
    shutil.copytree(tmp_path / "step-10", tmp_path / "step-20")
    assert checkpointer(tmp_path).verify(20) == [
        "checkpoint step-20: its manifest.json says step 10: the folder has been renamed"
    ]
    save(tmp_path, 101, keep=1)
    assert checkpointer(tmp_path).steps() == [101]
    assert (tmp_path / "step-10.bak" / MANIFEST).exists()
    assert (tmp_path / "step-20" / MANIFEST).exists()


def test_keep_latest_k(tmp_path: Path) -> None:
    for keep, left in ((0, [1, 2, 3, 10]), (3, [2, 3, 10]), (1, [10]), (20, [1, 2, 3, 10])):
        save(tmp_path / str(keep), 1, 2, 3, 10, keep=keep)
        assert checkpointer(tmp_path / str(keep)).steps() == left
        assert sorted(os.listdir(tmp_path / str(keep))) == sorted(f"step-{step}" for step in left)


def test_retention_touches_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    (tmp_path / "step-2" / "state.json").unlink()
    (tmp_path / "step-0").mkdir()
    (tmp_path / "notes").mkdir()
    save(tmp_path, 4, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-0", "step-1", "step-2", "step-4"]
    assert caplog.messages == [
        f"'{tmp_path / 'step-1'}' stays beyond checkpoint.keep_latest_k: it holds other files (notes.txt)"
    ]
    assert loads(tmp_path, 1)


def test_retention_keeps_what_was_just_saved_and_what_resumes(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15, keep=1)
    assert checkpointer(tmp_path).steps() == [15, 30]
    checkpointer(tmp_path, keep=1).save_model(40, tensors(1), JOB, torch.float32)
    assert checkpointer(tmp_path).steps() == [30, 40]


def test_a_deletion_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(local.shutil, "rmtree", fail)
    save(tmp_path, 2, keep=1)
    assert checkpointer(tmp_path).steps() == [2]
    monkeypatch.undo()
    checkpointer(tmp_path).prepare()
    assert os.listdir(tmp_path) == ["step-2"]


def test_only_checkpoint_folders_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "step-5.bak").mkdir()
    with pytest.raises(CheckpointError, match=r"step-5\.bak' is not a checkpoint folder: it is not deleted"):
        LocalStorage(tmp_path).delete("step-5.bak")
    LocalStorage(tmp_path).discard(LocalStorage(tmp_path).folder("step-5.bak"))
    assert os.listdir(tmp_path) == ["step-5.bak"]


def test_another_writer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync_and_intrude(folder: Path) -> None:
        sync_folder(folder)
        (tmp_path / "step-1").mkdir(exist_ok=True)

    monkeypatch.setattr(local, "sync_folder", sync_and_intrude)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 1)
    assert str(caught.value) == (
        f"cannot save step-1 in '{tmp_path}': '{tmp_path / 'step-1'}' has appeared while it was being saved: "
        "let only one job write to a dump_folder"
    )
    assert os.listdir(tmp_path / "step-1") == []


def test_infinite_values_survive_in_a_manifest(tmp_path: Path) -> None:
    job = JobIdentity({"training.max_norm": float("inf")})
    checkpointer(tmp_path).save(1, tensors(1), STATE, job)
    assert checkpointer(tmp_path).read_manifest(1).fingerprint == {"training.max_norm": float("inf")}
    assert json.loads((tmp_path / "step-1/state.json").read_text()) == STATE
