"""Where checkpoints are: the operations that must not be torn by a kill, whatever the storage can do by itself.

A `Storage` holds `Folder`s of plain files. `local` writes under a temporary name and renames; `remote`, for what fsspec
reaches by a URL and cannot rename, writes the manifest last. Either way a folder with a valid manifest is whole. What
is unfinished bears a name or a mark that only these classes give, and nothing else is ever removed. Rejected: one class
over fsspec for both, since it can neither sync a file nor rename a folder at once. Torch-free.
"""

import io
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from components.checkpoint.hashing import ChunkHasher
from components.checkpoint.manifest import FileEntry

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
LOCAL_URL = "file://"


def step_name(step: int) -> str:
    """The name of the folder that holds the checkpoint of a step."""
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for; None for names that are not exactly ours (step-05, step-5.bak)."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def aside_name(name: str, why: str) -> str:
    """A fresh name, no checkpoint's, for a folder that is in the way."""
    return f"{name}.{why}-{secrets.token_hex(8)}"


class HashedFile(io.RawIOBase):
    """A new file, written from its beginning to its end; hashed meanwhile, so that it need not be read again.

    `finish` is called with the file before it is closed, to bring it to the disk. Raises OSError.
    """

    def __init__(self, name: str, file: BinaryIO, finish: Callable[[BinaryIO], None] = lambda file: None) -> None:
        super().__init__()
        self._name, self._file, self._finish = name, file, finish
        self._hasher = ChunkHasher()

    @property
    def entry(self) -> FileEntry:
        """What was written: name, bytes, hashes."""
        return FileEntry(self._name, self._hasher.size, self._hasher.hashes())

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: memoryview | bytes) -> int:  # pyrefly: ignore[bad-override]  # no buffer type in Python 3.11
        """Write all of the data; their number of bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hasher.update(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written."""
        return self._hasher.size

    def close(self) -> None:
        """Bring it to the disk and close it."""
        if self.closed:
            return
        try:
            self._finish(self._file)
        finally:
            super().close()
            self._file.close()


class Folder(Protocol):
    """One flat folder of plain files."""

    @property
    def name(self) -> str:
        """Its name, as in `step-20`."""
        ...

    @property
    def path(self) -> str:
        """The whole path or URL."""
        ...

    @property
    def local(self) -> bool:
        """Whether other programs find plain files there."""
        ...

    def names(self) -> list[str]:
        """Names of all that is in it. Raises OSError."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of each regular file in it; −1 for anything else. Raises OSError."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError if it is no regular file, OSError."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file for reading, at any place. Raises CheckpointError if it is no regular file, OSError."""
        ...

    def create(self, name: str) -> HashedFile:
        """A new file, which is on the disk once it is closed. Raises FileExistsError, OSError."""
        ...


class Storage(Protocol):
    """The folder that holds a job's checkpoints, or its exports, each a folder of its own."""

    @property
    def path(self) -> str:
        """The whole path or URL."""
        ...

    def folder(self, name: str) -> Folder:
        """A folder in it, there or not."""
        ...

    def folder_names(self) -> list[str]:
        """Names of the folders in it, none if it is not there itself; links are left out. Raises CheckpointError."""
        ...

    def exists(self, name: str) -> bool:
        """Whether anything is in the way of a folder of that name."""
        ...

    def prepare(self) -> list[str]:
        """Create it, try whether it can be written to, and remove what killed runs left; the names of the latter.

        Raises OSError, CheckpointError.
        """
        ...

    def temporary(self, name: str) -> Folder:
        """An empty folder to write into what will be called `name`. Raises OSError, CheckpointError."""
        ...

    def commit(self, temporary: Folder, name: str, manifest: bytes) -> Folder:
        """Make a written folder whole: from here on it is there as `name`. Raises OSError, CheckpointError."""
        ...

    def discard(self, temporary: Folder) -> None:
        """Remove a temporary folder. Raises OSError, CheckpointError."""
        ...

    def set_aside(self, name: str, why: str) -> str:
        """Give a folder that is in the way a name that is no checkpoint's; the new name.

        Raises OSError, CheckpointError.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a checkpoint; a kill leaves it whole, or as something that `prepare` removes.

        Raises OSError, CheckpointError.
        """
        ...


def write_file(folder: Folder, name: str, data: bytes) -> FileEntry:
    """Write a new file and wait until it is on the disk. Raises OSError, also if the file exists."""
    with folder.create(name) as file:
        file.write(data)
    return file.entry


def read_file(folder: Folder, name: str) -> bytes:
    """All bytes of a file. Raises CheckpointError, OSError."""
    with folder.open(name) as file:
        return file.read()


def step_folders(storage: Storage) -> list[int]:
    """Steps that have a folder, ascending, whatever is in it. Raises CheckpointError."""
    return sorted(step for name in storage.folder_names() if (step := step_of(name)) is not None)


def _is_url(root: str | Path) -> bool:
    return "://" in str(root) and not str(root).startswith(LOCAL_URL)


def _local_path(root: str | Path) -> Path:
    return Path(str(root).removeprefix(LOCAL_URL))


def open_storage(root: str | Path) -> Storage:
    """The storage at a path or URL; nothing is read or written yet."""
    if _is_url(root):
        from components.checkpoint.remote import RemoteStorage

        return RemoteStorage(str(root).rstrip("/"))
    from components.checkpoint.local import LocalStorage

    return LocalStorage(_local_path(root))


def open_folder(path: str | Path) -> Folder:
    """The folder of any checkpoint, by path or URL; nothing is read yet. A path may lead through links."""
    if _is_url(path):
        from components.checkpoint.remote import RemoteFolder

        return RemoteFolder(str(path).rstrip("/"))
    from components.checkpoint.local import LocalFolder

    return LocalFolder(_local_path(path))
