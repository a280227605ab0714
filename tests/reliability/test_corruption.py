"""Whatever happens to the bytes of a checkpoint is found before anything is loaded: every byte, every length, and the
files as a whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.checkpoint.manifest import MANIFEST
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, checkpointer
from tests.reliability.harness_figures import record

STATE = {"train_state": {"step": 1}}
FILES = (".metadata", "__0_0.distcp", MANIFEST, "state.json", "tensors.json")


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((2,), value)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, as small as they can be: step 1 is a good one to fall back to, step 2 will be damaged."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        checkpointer(root).save(step, tensors(step), STATE, JOB)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoint")


def found(root: Path) -> list[str]:
    """What verifying says of step 2."""
    return checkpointer(root).verify(2)


def flip_each(path: Path, masks: tuple[int, ...]) -> int:
    """Change each byte of a file, one at a time, by each mask; how many changes were found."""
    raw, run, count = path.read_bytes(), checkpointer(path.parent.parent), 0
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(raw):
            for mask in masks:
                os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
                count += bool(run.verify(2))
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert path.read_bytes() == raw
    assert run.verify(2) == []
    return count


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(root: Path, name: str) -> None:
    path = root / "step-2" / name
    size = path.stat().st_size
    assert size > 10
    assert flip_each(path, (0xFF,)) == size


@pytest.mark.slow
def test_every_changed_bit_is_found(root: Path) -> None:
    masks = tuple(1 << bit for bit in range(8))
    sizes = {name: (root / "step-2" / name).stat().st_size for name in FILES}
    flips = {name: flip_each(root / "step-2" / name, masks) for name in FILES}
    assert flips == {name: 8 * size for name, size in sizes.items()}
    total = sum(sizes.values())
    record("flips", f"{8 * total} changed bits of {total} bytes in {len(FILES)} files: all found")


def test_every_shorter_length_is_found_and_one_that_is_longer(root: Path) -> None:
    count = 0
    for name in FILES:
        path = root / "step-2" / name
        raw = path.read_bytes()
        for size in reversed(range(len(raw))):
            os.truncate(path, size)
            assert found(root) != [], (name, size)
            count += 1
        path.write_bytes(raw + b"\0")
        assert found(root) != [], name
        path.write_bytes(raw)
        assert found(root) == []
    record("cuts", f"{count} lengths of {len(FILES)} files: all found")


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def become_a_folder(folder: Path, name: str) -> None:
    remove(folder, name)
    (folder / name).mkdir()


def become_empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


def come_from_the_other_step(folder: Path, name: str) -> None:
    shutil.copy(folder.parent / "step-1" / name, folder / name)


def change_places(folder: Path, name: str) -> None:
    other = FILES[FILES.index(name) - 1]
    (folder / name).rename(folder / "x")
    (folder / other).rename(folder / name)
    (folder / "x").rename(folder / other)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [remove, become_a_folder, become_empty, come_from_the_other_step, change_places], ids=lambda d: d.__name__
)
def test_damage_to_whole_files_is_found(root: Path, damage: Callable[[Path, str], None], name: str) -> None:
    same = (root / "step-1" / name).read_bytes() == (root / "step-2" / name).read_bytes()
    damage(root / "step-2", name)
    assert (found(root) == []) is (damage is come_from_the_other_step and same)
    assert checkpointer(root).latest() == (2 if found(root) == [] else 1)


def test_checkpoints_that_have_changed_names_are_found(root: Path) -> None:
    (root / "step-1").rename(root / "x")
    (root / "step-2").rename(root / "step-1")
    (root / "x").rename(root / "step-2")
    assert [checkpointer(root).verify(step) for step in (1, 2)] == [
        [f"checkpoint step-{step}: its manifest.json says step {other}: the folder has been renamed"]
        for step, other in ((1, 2), (2, 1))
    ]
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid"):
        checkpointer(root).latest()


def test_a_file_too_many_is_not_loaded_and_not_lost(root: Path) -> None:
    (root / "step-2/__1_0.distcp").write_bytes(b"of another")
    assert found(root) == []
    target = tensors(0)
    checkpointer(root).load(2, target, job=JOB)
    assert torch.equal(target["model.w"], tensors(2)["model.w"])
    checkpointer(root, keep=1).save(3, tensors(3), STATE, JOB)
    assert sorted(os.listdir(root)) == ["step-2", "step-3"]  # what holds a file of someone else's is not deleted
