"""The folder that holds checkpoints: names, and the operations that must not be torn by a kill.

A checkpoint is written under a temporary name and renamed when it is whole; it is deleted the other way round. So at
any instant a folder named `step-N` is either whole or was not made by these functions. What is temporary carries a name
that only these functions give, and nothing else is ever removed. For local and shared POSIX file systems; storage
without an atomic rename needs another class. Torch-free.
"""

import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from components.checkpoint.manifest import MANIFEST, Manifest
from components.runtime.errors import CheckpointError

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.(?:tmp|del)-step-(?:0|[1-9][0-9]*)-[0-9a-f]{16}")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step}"


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for; None for names that are not exactly ours (step-05, step-5.bak)."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[int]:
    """Steps that have a folder, ascending, whatever is in it. A symbolic link is not a folder of ours.

    Raises CheckpointError if `root` cannot be read.
    """
    if not root.is_dir():
        return []
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise CheckpointError(f"'{root}' cannot be read: {error.strerror}") from error
    return sorted(step for name in names if (step := step_of(name)) is not None)


def prepare(root: Path) -> list[str]:
    """Create the folder, try whether it can be written to, and remove what killed runs left; the names of the latter.

    Raises OSError.
    """
    _make_folder(root)
    probe = make_temporary(root, 0)
    write_file(probe / "probe", b"")
    shutil.rmtree(probe)
    with os.scandir(root) as entries:
        left = [
            entry.name for entry in entries if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for name in left:
        shutil.rmtree(root / name)
    return sorted(left)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they outlive a crash."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _fresh(root: Path, kind: str, name: str) -> Path:
    return root / f".{kind}-{name}-{secrets.token_hex(8)}"


def make_temporary(root: Path, step: int) -> Path:
    """A new folder to write the checkpoint of a step into. Raises OSError."""
    _make_folder(root)
    folder = _fresh(root, "tmp", f"step-{step}")
    folder.mkdir()
    return folder


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk. Raises OSError, also if the file exists."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path, manifest: bytes) -> None:
    """Make a written folder a checkpoint: manifest, folder, rename, parent, each on the disk before the next begins.

    If the last sync fails the rename is taken back, since it may not outlive a crash. Raises OSError, and
    CheckpointError if `final` has appeared in the meantime.
    """
    write_file(temporary / MANIFEST, manifest)
    sync_folder(temporary)
    if os.path.lexists(final):
        raise CheckpointError(
            f"'{final}' has appeared while it was being saved: let only one job write to a dump_folder"
        )
    os.rename(temporary, final)
    try:
        sync_folder(final.parent)
    except OSError:
        os.rename(final, temporary)
        raise


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder that is in the way to `step-N.<why>-…`, no checkpoint's name; its new path. Raises OSError."""
    aside = folder.with_name(f"{folder.name}.{why}-{secrets.token_hex(8)}")
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def discard(temporary: Path) -> None:
    """Remove a temporary folder. Raises OSError."""
    if _LEFTOVER.fullmatch(temporary.name) and temporary.exists():
        shutil.rmtree(temporary)


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names in a checkpoint's folder that its manifest does not list."""
    return sorted(set(os.listdir(folder)) - {entry.name for entry in manifest.files} - {MANIFEST})


def delete(folder: Path) -> None:
    """Remove a checkpoint; a kill leaves it whole or under a temporary name. Raises OSError."""
    if step_of(folder.name) is None or not stat.S_ISDIR(folder.lstat().st_mode):
        raise CheckpointError(f"'{folder}' is not a checkpoint folder: it is not deleted")
    doomed = _fresh(folder.parent, "del", folder.name)
    os.rename(folder, doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)
