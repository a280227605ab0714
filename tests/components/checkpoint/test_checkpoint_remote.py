"""Checkpoints at URLs: the same promises as on a disk, on storage that cannot rename."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch.distributed as dist

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.manifest import MANIFEST
from components.checkpoint.remote import MARK, RemoteFolder, RemoteStorage
from components.checkpoint.storage import LOCAL_URL, open_folder, open_storage, write_file
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.object_store import PARTS, PROTOCOL, Blow, Killed, ObjectStore
from tests.components.checkpoint.support import JOB, STATE, same, tensors, zeros
from tests.ranks import run_ranks

EIO = OSError(5, "Input/output error")
FULL = OSError(28, "No space left on device")


@pytest.fixture(params=["memory", PROTOCOL, PARTS])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/run/checkpoint"


def checkpointer(root: str, keep: int = 0) -> Checkpointer:
    return Checkpointer(root, keep_latest_k=keep, group=None)


def save(root: str, *steps: int, keep: int = 0) -> None:
    run = checkpointer(root, keep)
    run.prepare()
    for step in steps:
        run.save(step, tensors(step), STATE, JOB)


def loads(root: str, step: int | str, seed: int | None = None) -> bool:
    found = zeros()
    state = checkpointer(root).load(step, found, job=JOB)
    return state == STATE and same(found, tensors(step if isinstance(step, int) else seed or 0))


def files(root: str) -> list[str]:
    """All files below the root."""
    system, path = fsspec.core.url_to_fs(root)
    return sorted(str(name).split("/checkpoint/")[1] for name in system.find(path))


def put(url: str, data: bytes) -> None:
    system, path = fsspec.core.url_to_fs(url)
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.pipe_file(path, data)


def error_of(fn: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        fn()
    return str(caught.value)


SAVED = ["__0_0.distcp", "manifest.json", "state.json", "tensors.json"]


def test_round_trip(root: str) -> None:
    save(root, 1, 2, 3, keep=2)
    assert files(root) == [f"step-{step}/{name}" for step in (2, 3) for name in SAVED]
    assert checkpointer(root).steps() == [2, 3]
    assert checkpointer(root).latest() == 3
    assert loads(root, 3)
    assert loads("memory://elsewhere", f"{root}/step-2", 2)
    assert checkpointer(root).verify(3) == []
    assert str(checkpointer(root).storage.folder("step-3")) == f"{root}/step-3"


def test_damage_is_found(root: str) -> None:
    save(root, 1, 2)
    folder = RemoteStorage(root).folder("step-2")
    with folder.open("state.json") as file:
        raw = file.read()
    put(f"{root}/step-2/state.json", raw.replace(b"1", b"2"))
    assert checkpointer(root).verify(2) == [
        f"checkpoint step-2 is broken: state.json: bytes 0 to {len(raw)} have changed"
    ]
    assert checkpointer(root).latest() == 1
    put(f"{root}/step-2/state.json", raw[:-1])
    assert checkpointer(root).verify(2) == [
        f"checkpoint step-2: state.json has {len(raw) - 1} bytes instead of {len(raw)}"
    ]
    save(root, 2)
    assert loads(root, 2)
    aside = [name for name in RemoteStorage(root).folder_names() if name.startswith("step-2.broken-")]
    assert [name for name in files(root) if name.startswith("step-2.")] == [f"{aside[0]}/{name}" for name in SAVED]


def test_what_is_not_ours_stays(root: str, caplog: pytest.LogCaptureFixture) -> None:
    save(root, 1)
    theirs = ["notes/a", "step-05/.unfinished", "step-2/a", "step-3.bak/.unfinished", "step-9.superseded/.unfinished"]
    for name in theirs:
        put(f"{root}/{name}", b"theirs")
    put(f"{root}/step-1/notes.txt", b"theirs")
    message = error_of(lambda: save(root, 2))
    where = f"'{root}/step-2'"
    assert message == (
        f"cannot save step-2 in '{root}': {where} has no manifest.json: Espalier did not write it; move it away"
    )
    assert error_of(lambda: RemoteStorage(root).delete("step-2")) == (
        f"{where} is not a checkpoint folder: it is not deleted"
    )
    caplog.clear()
    save(root, 4, keep=1)
    assert caplog.messages == [
        f"'{root}/step-1' stays beyond checkpoint.keep_latest_k: it holds other files (notes.txt)"
    ]
    ours = [f"step-{step}/{name}" for step in (1, 4) for name in SAVED]
    assert files(root) == sorted([*theirs, "step-1/notes.txt", *ours])
    put(f"{root}/step-1/deep/a", b"theirs")
    assert error_of(lambda: RemoteStorage(root).set_aside("step-1", "superseded")) == (
        f"'{root}/step-1' holds deep: Espalier did not write it; move it away"
    )


def test_prepare_removes_what_killed_runs_left(root: str, caplog: pytest.LogCaptureFixture) -> None:
    save(root, 1)
    aside = f"step-5.superseded-{'0a' * 8}"
    for name in ("step-2/.unfinished", "step-2/__0_0.distcp", f"{aside}/.unfinished", "step-1/.unfinished"):
        put(f"{root}/{name}", b"")
    put(f"{root}/step-3/.unfinished", b"")
    put(f"{root}/step-3/{MANIFEST}", b'{"half')
    checkpointer(root).prepare()
    assert files(root) == [f"step-1/{name}" for name in SAVED]
    assert caplog.messages == [f"removed 3 unfinished checkpoints of killed runs: step-2, step-3, {aside}"]
    assert RemoteStorage(root).folder_names() == ["step-1"]


@pytest.mark.parametrize("name", ["../step-1/state.json", "/etc/passwd", "..", "a/b", "", "a b", "%2e%2e", "?x"])
def test_names_do_not_lead_out_of_the_folder(root: str, name: str) -> None:
    save(root, 1)
    folder = RemoteStorage(root).folder("step-1")
    for use in (folder.open, folder.create, folder.size, folder.remove):
        assert error_of(lambda use=use: use(name)) == f"{name!r} is not a plain file name"


def test_a_file_is_written_once(root: str) -> None:
    storage = RemoteStorage(root)
    storage.prepare()
    folder = storage.temporary("step-1")
    assert write_file(folder, "a", b"abc").size == 3
    with pytest.raises(FileExistsError):
        folder.create("a")
    assert (folder.names(), folder.sizes(), folder.size("a")) == (["a"], {"a": 3}, 3)
    assert folder.entries() == {"a": 3, MARK: 0}
    with pytest.raises(FileNotFoundError):
        folder.open("b")
    assert error_of(lambda: RemoteFolder(root).size("step-1")) == "step-1 is not a regular file"


def test_links_are_not_followed(tmp_path: Path) -> None:
    root = f"{PROTOCOL}://{tmp_path}/checkpoint"
    save(root, 1)
    (tmp_path / "checkpoint/step-1/state.json").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint/step-1/state.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint/step-2").symlink_to("step-1")
    assert checkpointer(root).verify(1) == ["checkpoint step-1: state.json is not a regular file"]
    assert (
        error_of(lambda: RemoteStorage(root).folder("step-1").open("state.json")) == "state.json is not a regular file"
    )
    assert RemoteStorage(root).folder_names() == ["step-1"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "Install s3fs to access S3: install that package on every machine"),
        ("nothing://x/y", "fsspec knows no nothing://; give a path, or a URL as in s3://bucket/name"),
    ],
)
def test_what_is_missing_is_told(url: str, message: str) -> None:
    assert error_of(checkpointer(url).prepare) == f"checkpoint.folder: '{url}' cannot be written to: '{url}': {message}"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (PermissionError("Forbidden"), "PermissionError: Forbidden"),
        (RuntimeError("Unable to locate credentials\nmore"), "RuntimeError: Unable to locate credentials"),
    ],
)
def test_refusals_say_what_to_look_at(
    tmp_path: Path, failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{PROTOCOL}://{tmp_path}/x"
    monkeypatch.setattr(ObjectStore, "blow", Blow(0, failure))
    assert error_of(checkpointer(url).prepare) == (
        f"checkpoint.folder: '{url}' cannot be written to: '{url}': {message}: see that it can be reached from here, "
        "with credentials that may read and write there, on every machine"
    )


def test_a_bucket_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_self: object, path: str, **_: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "_strip_protocol", lambda path: path.split("://")[-1])
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "mkdir", missing)
    assert error_of(RemoteStorage("memory://bucket/x").prepare) == (
        "'memory://bucket/x' is not there: create its bucket first"
    )


def test_what_is_local_is_renamed(tmp_path: Path) -> None:
    assert open_storage(f"{LOCAL_URL}{tmp_path}") == open_storage(tmp_path) == open_storage(str(tmp_path))
    assert open_folder(f"{LOCAL_URL}{tmp_path}/step-1") == open_folder(tmp_path / "step-1")


def moments(
    root: Path, act: Callable[[str], None], blow: Callable[[int], Blow], *steps: int
) -> Iterator[tuple[str, bool]]:
    """Act on a folder that holds these steps, with a blow at the first, second, … operation; whether that raised."""
    before, url = root.with_name("before"), f"{PROTOCOL}://{root}"
    save(f"{PROTOCOL}://{before}", *steps)
    number, came = 0, True
    while came:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ObjectStore, "blow", blow(number))
            try:
                act(url)
            except (Killed, CheckpointError):
                raised = True
            came = ObjectStore.blow.seen > number
        if came:
            yield url, raised
        number += 1


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path, when: str) -> None:
    found = []
    for url, raised in moments(tmp_path / "c", lambda url: save(url, 2, keep=1), lambda n: Blow(n, Killed(), when), 1):
        assert raised
        reader = checkpointer(url).latest()
        assert reader is not None
        assert loads(url, reader)
        run = checkpointer(url)
        run.prepare()
        assert run.latest() == reader
        assert {*os.listdir(tmp_path / "c")} <= {"step-1", "step-2"}
        assert MARK not in {name.name for name in (tmp_path / "c").rglob("*")}
        found.append(reader)
        save(url, 2, keep=1)
        assert checkpointer(url).steps() in ([2], [1, 2])
        assert loads(url, 2)
    assert found == sorted(found)
    assert {*found} == {1, 2}
    assert len(found) > 30


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_a_failure_at_any_moment_leaves_the_earlier_checkpoint(tmp_path: Path, when: str) -> None:
    saved = []
    for url, raised in moments(tmp_path / "c", lambda url: save(url, 2, keep=1), lambda n: Blow(n, EIO, when), 1):
        latest = 1 if raised else 2
        assert checkpointer(url).latest() == latest
        assert loads(url, latest)
        saved.append(not raised)
        checkpointer(url).prepare()
        assert {*os.listdir(tmp_path / "c")} <= {"step-1", "step-2"}
        assert checkpointer(url).steps() in ([1], [2], [1, 2])
    assert {*saved} == {True, False}


@pytest.mark.parametrize("failure", [Killed(), EIO])
def test_setting_aside_loses_nothing(tmp_path: Path, failure: BaseException) -> None:
    for url, _ in moments(tmp_path / "c", lambda url: checkpointer(url).supersede(1), lambda n: Blow(n, failure), 1, 2):
        checkpointer(url).prepare()
        names = RemoteStorage(url).folder_names()
        aside = [name for name in names if name.startswith("step-2.superseded-")]
        assert {*names} - {*aside} in ({"step-1"}, {"step-1", "step-2"})
        assert all(loads(url, f"{url}/{name}", 2) for name in aside)
        assert "step-2" not in names or loads(url, 2)
        assert aside or "step-2" in names
        checkpointer(url).supersede(1)
        assert checkpointer(url).latest() == 1


def test_the_message_of_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"{PROTOCOL}://{tmp_path}/c"
    save(root, 1)
    monkeypatch.setattr(ObjectStore, "blow", Blow(9, FULL))
    assert error_of(lambda: checkpointer(root).save(2, tensors(2), STATE, JOB)) == (
        f"cannot save step-2 in '{root}': No space left on device: free space there, or lower checkpoint.keep_latest_k"
    )


def on_ranks(root: str) -> tuple[list[int], Any, bool, str]:
    """Save and load on several ranks; then one of them fails."""
    run = Checkpointer(root, keep_latest_k=1, group=dist.group.WORLD)
    run.prepare()
    mine = {**tensors(1), f"model.stage{dist.get_rank()}": tensors(1)["model.w"]}
    run.save(1, mine, STATE, JOB)
    run.save(2, mine, STATE, JOB)
    found = {name: value * 0 for name, value in mine.items()}
    state = run.load(run.resolve(-1) or 0, found, job=JOB)
    if dist.get_rank():
        ObjectStore.blow = Blow(1, EIO)
    text = error_of(lambda: run.save(3, mine, STATE, JOB))
    return run.steps(), state, same(found, mine), text


def test_several_ranks(tmp_path: Path) -> None:
    root = f"{PROTOCOL}://{tmp_path}/checkpoint"
    text = f"cannot save step-3 in '{root}': rank 1: '{root}/step-3': OSError: Input/output error: "
    first, second = run_ranks(2, on_ranks, root)
    assert first == second
    assert first[:3] == ([2], STATE, True)
    assert first[3].startswith(text)
    assert sorted(os.listdir(tmp_path / "checkpoint/step-2")) == ["__0_0.distcp", "__1_0.distcp", *SAVED[1:]]
    assert os.listdir(tmp_path / "checkpoint") == ["step-2"]
