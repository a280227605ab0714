"""Damaged and hostile checkpoints: what is damaged is refused; what is forged, hashes included, still runs nothing."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoint.manifest import MANIFEST, parse
from components.checkpoint.storage import Folder, read_file
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, checkpointer, loads, reseal, save, zeros


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, 1)
    return tmp_path / "step-1"


def problems(folder: Path) -> list[str]:
    return checkpointer(folder.parent).verify(1)


def load_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpointer(folder.parent).load(1, zeros(), job=JOB)
    return str(caught.value)


def test_every_changed_byte_of_the_manifest_is_found(folder: Path) -> None:
    raw = (folder / MANIFEST).read_bytes()
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 1 << position % 8
        with pytest.raises(CheckpointError):
            parse(bytes(changed))
    assert parse(raw).step == 1


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "tensors.json"])
def test_a_changed_byte_or_a_cut_is_found_in_each_file(folder: Path, name: str) -> None:
    path = folder / name
    raw = path.read_bytes()
    for position in {*range(0, len(raw), max(1, len(raw) // 40)), len(raw) - 1}:
        changed = bytearray(raw)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert problems(folder) == [f"checkpoint step-1 is broken: {name}: bytes 0 to {len(raw)} have changed"]
    for size in (0, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        assert problems(folder) == [f"checkpoint step-1: {name} has {size} bytes instead of {len(raw)}"]
        assert checkpointer(folder.parent).steps() == []
    path.write_bytes(raw)
    assert problems(folder) == []


def test_without_a_manifest_it_is_no_checkpoint(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / MANIFEST).unlink()
    assert checkpointer(folder.parent).steps() == []
    assert checkpointer(folder.parent).latest() is None
    assert caplog.messages == [f"'{folder}' has no manifest.json: it is not a checkpoint, and is ignored"]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the right digest again."""
    import hashlib

    path = folder / MANIFEST
    content = json.loads(path.read_bytes())
    content.pop("digest")
    change(content)
    body = (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
    content["digest"] = hashlib.sha256(body).hexdigest()
    path.write_bytes((json.dumps(content, sort_keys=True, indent=1) + "\n").encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "manifest.json has format 2, newer than 1: read it with a newer Espalier"),
        (lambda m: m.update(step=2), "its manifest.json says step 2: the folder has been renamed"),
        (lambda m: m.pop("files"), "manifest.json is not a manifest (files: Field required)"),
        (lambda m: m.update(more=1), "manifest.json has been changed: its digest does not match"),
        (lambda m: m.update(chunk_bytes=0), "manifest.json is not a manifest (chunk_bytes: Input should be greater"),
        (
            lambda m: m["files"][0].update(size=-1),
            "manifest.json is not a manifest (files.0.size: Input should be greater",
        ),
        (lambda m: m["files"][0].update(hashes=[]), "manifest.json: '.metadata' has 0 hashes for "),
        (lambda m: m["files"][0].update(name="../evil"), "manifest.json: '../evil' is not a plain file name"),
        (lambda m: m["files"][0].update(name="/etc/passwd"), "manifest.json: '/etc/passwd' is not a plain file name"),
        (lambda m: m["files"][0].update(name=".."), "manifest.json: '..' is not a plain file name"),
        (lambda m: m["files"].append(m["files"][0]), "manifest.json: '.metadata' is listed twice"),
        (lambda m: m["files"].pop(), "manifest.json lists no tensors.json or no state.json"),
    ],
)
def test_forged_manifests_are_refused(folder: Path, change: Callable, message: str) -> None:
    edit_manifest(folder, change)
    assert load_error(folder).startswith(f"checkpoint step-1: {message}")


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_nonsense_is_no_manifest(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)
    assert load_error(folder).startswith("checkpoint step-1: manifest.json is not a manifest (")


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def test_the_evil_object_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_hostile_dcp_index_is_never_read(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    reseal(folder)
    assert loads(folder.parent, 1)
    assert not (tmp_path / "marker").exists()


def torch_save(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_tensor(folder: Path, data: bytes) -> None:
    """Put other bytes where the index says that model.w is."""
    index = json.loads((folder / "tensors.json").read_bytes())
    index["model.w"]["pieces"][0].update(file="state.json", start=0, length=len(data))
    (folder / "tensors.json").write_text(json.dumps(index))
    (folder / "state.json").write_bytes(data)
    reseal(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_tensors_run_nothing(
    folder: Path, tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.checkpoint.checkpointer.read_files", read_index_only)
    evil = Evil(tmp_path / "marker")
    replace_tensor(folder, pickle.dumps(evil, protocol=2) if legacy else torch_save(evil))
    assert load_error(folder).startswith("checkpoint step-1: UnpicklingError: Weights only load failed")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("value", [{"a": 1}, torch.zeros(1), torch.zeros(5, 3, 2), 7])
def test_things_that_are_not_the_tensor_are_refused(
    folder: Path, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.checkpoint.checkpointer.read_files", read_index_only)
    replace_tensor(folder, torch_save(value))
    assert load_error(folder).startswith("checkpoint step-1: ")


def read_index_only(folder: Folder, manifest: Any) -> tuple:
    """state.json holds a tensor in these tests: leave it alone."""
    from components.checkpoint.tensors import parse_index

    sizes = {entry.name: entry.size for entry in manifest.files}
    return parse_index(read_file(folder, "tensors.json"), sizes), {}


def change_piece(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["model.w"]["pieces"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_piece(file="../step-2/x"), "model.w lies in '../step-2/x', which is no file of the checkpoint"),
        (change_piece(file="/etc/passwd"), "model.w lies in '/etc/passwd', which is no file of the checkpoint"),
        (change_piece(file=MANIFEST), "model.w lies in 'manifest.json', which is no file of the checkpoint"),
        (change_piece(start=10**9), "model.w reaches beyond the end of __0_0.distcp"),
        (change_piece(offsets=[1, 0]), "model.w has a piece outside its shape [5, 3]"),
        (change_piece(sizes=[5]), "model.w has a piece outside its shape [5, 3]"),
        (change_piece(sizes=[4, 3]), "model.w is not filled exactly by its pieces"),
        (lambda i: i["model.w"].update(pieces=[]), "model.w is not filled exactly by its pieces"),
        (lambda i: i["model.w"].update(dtype="load"), "model.w has no type that torch knows ('load')"),
    ],
)
def test_forged_indices_are_refused(folder: Path, change: Callable, message: str) -> None:
    path = folder / "tensors.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    reseal(folder)
    assert load_error(folder) == f"checkpoint step-1: tensors.json: {message}"


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "tensors.json", MANIFEST])
def test_links_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert load_error(folder) == f"checkpoint step-1: {name} is not a regular file"
    assert checkpointer(folder.parent).steps() == []


def test_a_linked_folder_is_not_ours(folder: Path) -> None:
    (folder.parent / "step-2").symlink_to(folder)
    assert checkpointer(folder.parent).steps() == [1]
    assert checkpointer(folder.parent).verify(2) == [
        "checkpoint step-2: it is a symbolic link, not a folder: name its target in checkpoint.initial_load_path"
    ]
