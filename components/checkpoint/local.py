"""Checkpoints on local and shared POSIX file systems.

A checkpoint is written under a temporary name and renamed when it is whole; it is deleted the other way round. So at
any instant a folder named `step-N` is either whole or was not made by these functions. Each step is on the disk before
the next begins: files, folder, rename, parent. What is temporary carries a name that only this module gives.
Torch-free.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from components.checkpoint.manifest import MANIFEST
from components.checkpoint.storage import Folder, HashedFile, aside_name, step_of, write_file
from components.runtime.durable import sync_folder
from components.runtime.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(?:tmp|del)-step-(?:0|[1-9][0-9]*)-[0-9a-f]{16}")
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFolder:
    """A folder of plain files; no link in it is followed."""

    where: Path
    """Its path."""
    own: bool = False
    """Whether it lies in a LocalStorage: then it must not be a link itself."""
    local: bool = True

    @property
    def name(self) -> str:
        """Its name."""
        return self.where.name

    @property
    def path(self) -> str:
        """The whole path."""
        return str(self.where)

    def __str__(self) -> str:
        return self.path

    def names(self) -> list[str]:
        """Names of all that is in it. Raises OSError."""
        return sorted(os.listdir(self.where))

    def sizes(self) -> dict[str, int]:
        """Bytes of each regular file in it; −1 for anything else. Raises OSError."""
        with os.scandir(self.where) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
                for entry in entries
            }

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError if it is no regular file, OSError."""
        self._require_folder()
        return _regular_size(name, (self.where / name).lstat())

    def open(self, name: str) -> BinaryIO:
        """A file for reading. Raises CheckpointError if it is no regular file, OSError."""
        self._require_folder()
        try:
            descriptor = os.open(self.where / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{name} is not a regular file") from error
            raise
        try:
            _regular_size(name, os.fstat(descriptor))
        except CheckpointError:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")

    def create(self, name: str) -> HashedFile:
        """A new file, which is on the disk once it is closed. Raises FileExistsError, OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return HashedFile(name, os.fdopen(os.open(self.where / name, flags, 0o666), "wb", _BUFFER_BYTES), _sync)

    def _require_folder(self) -> None:
        if self.own and self.where.is_symlink():
            raise CheckpointError(
                "it is a symbolic link, not a folder: name its target in checkpoint.initial_load_path"
            )


def _regular_size(name: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name} is not a regular file")
    return status.st_size


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they outlive a crash."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@dataclass(frozen=True)
class LocalStorage:
    """The folder `root` that holds folders named `step-N`."""

    root: Path

    @property
    def path(self) -> str:
        """The whole path."""
        return str(self.root)

    def folder(self, name: str) -> LocalFolder:
        """A folder in it, there or not."""
        return LocalFolder(self.root / name, own=True)

    def folder_names(self) -> list[str]:
        """Names of the folders in it; links are left out. Raises CheckpointError."""
        if not self.root.is_dir():
            return []
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            raise CheckpointError(f"'{self.root}' cannot be read: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        """Whether anything has that name."""
        return os.path.lexists(self.root / name)

    def prepare(self) -> list[str]:
        """Create the folder, try whether it can be written to, and remove what killed runs left; the latter's names.

        Raises OSError.
        """
        _make_folder(self.root)
        probe = self.temporary("step-0")
        write_file(probe, "probe", b"")
        shutil.rmtree(probe.where)
        left = [name for name in self.folder_names() if _LEFTOVER.fullmatch(name)]
        for name in left:
            shutil.rmtree(self.root / name)
        return left

    def temporary(self, name: str) -> LocalFolder:
        """A new folder to write what will be called `name` into. Raises OSError."""
        _make_folder(self.root)
        folder = self._fresh("tmp", name)
        folder.mkdir()
        return LocalFolder(folder, own=True)

    def _fresh(self, kind: str, name: str) -> Path:
        return self.root / f".{kind}-{name}-{secrets.token_hex(8)}"

    def commit(self, temporary: Folder, name: str, manifest: bytes) -> LocalFolder:
        """Make a written folder a checkpoint: manifest, folder, rename, parent, each on the disk before the next.

        If the last sync fails the rename is taken back, since it may not outlive a crash. Raises OSError, and
        CheckpointError if `name` has appeared in the meantime.
        """
        made, final = self.root / temporary.name, self.root / name
        write_file(temporary, MANIFEST, manifest)
        sync_folder(made)
        if os.path.lexists(final):
            raise CheckpointError(
                f"'{final}' has appeared while it was being saved: let only one job write to a dump_folder"
            )
        os.rename(made, final)
        try:
            sync_folder(self.root)
        except OSError:
            os.rename(final, made)
            raise
        return self.folder(name)

    def discard(self, temporary: Folder) -> None:
        """Remove a temporary folder. Raises OSError."""
        if _LEFTOVER.fullmatch(temporary.name) and self.exists(temporary.name):
            shutil.rmtree(self.root / temporary.name)

    def set_aside(self, name: str, why: str) -> str:
        """Rename a folder that is in the way to `step-N.<why>-…`, no checkpoint's; the new name. Raises OSError."""
        aside = aside_name(name, why)
        os.rename(self.root / name, self.root / aside)
        sync_folder(self.root)
        return aside

    def delete(self, name: str) -> None:
        """Remove a checkpoint; a kill leaves it whole or under a temporary name. Raises OSError, CheckpointError."""
        folder = self.root / name
        if step_of(name) is None or not stat.S_ISDIR(folder.lstat().st_mode):
            raise CheckpointError(f"'{folder}' is not a checkpoint folder: it is not deleted")
        doomed = self._fresh("del", name)
        os.rename(folder, doomed)
        sync_folder(self.root)
        shutil.rmtree(doomed)
