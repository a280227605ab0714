"""Checkpoints on storage that fsspec reaches by a URL, such as `s3://bucket/run`: no folder can be renamed at once.

A checkpoint is written under its last name, and the manifest is written last; it is deleted the other way round. A
mark, the file `.unfinished`, is written before anything else and removed after everything else:

| mark | manifest | what it is |
|---|---|---|
| yes | no | what a killed run left: `prepare` removes it |
| any | yes | a checkpoint |
| no | no | not ours: never written into, never deleted |

So nothing is removed that does not bear a name of ours and hold the mark or a manifest. A folder is set aside by
copying it, its manifest last, and deleting it then. Relied on: a file is there, whole, once writing it has returned,
and lists show it. Buckets are never made. Rejected: temporary names and copies at the end, at twice the traffic.
Torch-free.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from components.checkpoint.manifest import MANIFEST, is_plain, parse
from components.checkpoint.storage import Folder, HashedFile, aside_name, step_of
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger
from components.runtime.urls import protocol_problem

MARK = ".unfinished"
_OURS = re.compile(r"step-(?:0|[1-9][0-9]*)(?:\.[a-z]+-[0-9a-f]{16})?")
_READING = {"block_size": 8 << 20, "cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
"""Tensors are read here and there in a file; bytes that fsspec keeps of it are bounded."""
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEND = "see that it can be reached from here, with credentials that may read and write there, on every machine"


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turns what storage and its packages raise into a CheckpointError, but for files that are there or not."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, FileExistsError):
        raise
    except ImportError as error:
        raise CheckpointError(f"'{url}': {error}: install that package on every machine") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SPACE:
            raise
        text = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise CheckpointError(f"'{url}': {type(error).__name__}: {text}: {_MEND}") from error


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of plain files; the mark is not told of."""

    path: str
    """Its URL."""
    local: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return self.path

    def names(self) -> list[str]:
        """Names of all that is in it; none if it is not there. Raises CheckpointError."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Bytes of each regular file in it; −1 for anything else. Raises CheckpointError."""
        return {name: size for name, size in self.entries().items() if name != MARK}

    def entries(self) -> dict[str, int]:
        """`sizes`, with the mark."""
        return {name: info["size"] if info["type"] == "file" else -1 for name, info in _infos(self.path).items()}

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError if it is no regular file, FileNotFoundError."""
        with _reaching(self.path):
            files, path = self.at(name)
            info = files.info(path)
        if info["type"] != "file" or info.get("islink"):
            raise CheckpointError(f"{name} is not a regular file")
        return info["size"]

    def open(self, name: str) -> BinaryIO:
        """A file for reading. Raises CheckpointError if it is no regular file, FileNotFoundError."""
        self.size(name)
        with _reaching(self.path):
            files, path = self.at(name)
            return files.open(path, "rb", **_READING)

    def create(self, name: str) -> HashedFile:
        """A new file, which is in the storage once it is closed. Raises FileExistsError, CheckpointError."""
        with _reaching(self.path):
            files, path = self.at(name)
            if _info(files, path):
                raise FileExistsError(errno.EEXIST, "File exists", f"{self.path}/{name}")
            return HashedFile(name, files.open(path, "wb"), self._upload)

    def _upload(self, file: BinaryIO) -> None:
        with _reaching(self.path):
            file.close()

    def at(self, name: str) -> tuple[Any, str]:
        """The storage and the path of a file there. Raises CheckpointError for a name that leads elsewhere."""
        if name != MANIFEST and not is_plain(name):
            raise CheckpointError(f"{name!r} is not a plain file name")
        files, path = _connect(self.path)
        return files, f"{path}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whether it is there or not. Raises CheckpointError."""
        with _reaching(self.path):
            files, path = self.at(name)
            try:
                files.pipe_file(path, data)
            except FileNotFoundError as error:
                raise CheckpointError(f"'{self.path}' is not there: create its bucket or folder first") from error

    def remove(self, name: str) -> None:
        """Remove a file. Raises FileNotFoundError, CheckpointError."""
        with _reaching(self.path):
            files, path = self.at(name)
            files.rm_file(path)

    def make(self) -> None:
        """Create it, where there are folders, and its parents; never a bucket. Raises CheckpointError."""
        with _reaching(self.path):
            try:
                _make_folder(*_connect(self.path))
            except FileNotFoundError as error:
                raise CheckpointError(f"'{self.path}' is not there: create its bucket first") from error

    def clear(self) -> None:
        """Remove its files, the manifest first and the mark last, and itself where there are folders.

        Raises CheckpointError, OSError.
        """
        plain = [name for name, size in self.entries().items() if size >= 0]
        for name in sorted(plain, key=lambda name: (name == MARK) - (name == MANIFEST)):
            self.remove(name)
        with _reaching(self.path):
            files, path = _connect(self.path)
            files.invalidate_cache()
            if _info(files, path).get("type") == "directory" and not self.entries():
                files.rmdir(path)


def _connect(url: str) -> tuple[Any, str]:
    """The file system, an fsspec.AbstractFileSystem (whose annotations do not tell modes apart), and the path in it."""
    if problem := protocol_problem(url):
        raise CheckpointError(f"'{url}': {problem}")
    files, path = url_to_fs(url)
    return files, str(path).rstrip("/")


def _info(files: Any, path: str) -> dict[str, Any]:
    """What fsspec knows of a path; empty if nothing is there. Its own `exists` says that also of what it cannot see."""
    try:
        return files.info(path)
    except FileNotFoundError:
        return {}


def _infos(url: str) -> dict[str, dict[str, Any]]:
    """What fsspec knows of all that is in a folder, by name; nothing if it is not there."""
    with _reaching(url):
        files, path = _connect(url)
        files.invalidate_cache()  # others write there, too
        try:
            infos = files.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    places = {str(info["name"]).rstrip("/"): info for info in infos}
    return {place.rpartition("/")[2]: info for place, info in places.items() if place.lstrip("/") != path.lstrip("/")}


def _make_folder(files: Any, path: str) -> None:
    """Object stores have no folders: nothing happens there but that a bucket is looked for."""
    if "/" not in path:  # a bucket
        return
    try:
        files.mkdir(path, create_parents=False)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        if "/" not in parent:
            raise
        _make_folder(files, parent)
        files.mkdir(path, create_parents=False)


@dataclass(frozen=True)
class RemoteStorage:
    """The folder at a URL that holds folders named `step-N`."""

    path: str
    """Its URL."""

    def folder(self, name: str) -> RemoteFolder:
        """A folder in it, there or not."""
        return RemoteFolder(f"{self.path}/{name}")

    def folder_names(self) -> list[str]:
        """Names of the folders in it. Raises CheckpointError."""
        return sorted(name for name, info in _infos(self.path).items() if info["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Whether anything has that name; what a killed run left does not count. Raises CheckpointError."""
        entries = self.folder(name).entries()
        if MARK in entries:
            return MANIFEST in entries
        with _reaching(self.path):
            files, path = _connect(self.folder(name).path)
            return bool(entries) or _info(files, path).get("type", "directory") != "directory"

    def prepare(self) -> list[str]:
        """Create it, try whether it can be written to, and remove what killed runs left; the names of the latter.

        Raises CheckpointError.
        """
        itself = RemoteFolder(self.path)
        itself.make()
        itself.put(MARK, b"")
        itself.remove(MARK)
        return [name for name in self.folder_names() if _OURS.fullmatch(name) and self._tidy(self.folder(name))]

    def _tidy(self, folder: RemoteFolder) -> bool:
        """Whether it was what a killed run left, and is gone."""
        entries = folder.entries()
        if MARK in entries and MANIFEST in entries and _is_manifest(folder):
            folder.remove(MARK)
        elif MARK in entries or not entries:  # empty: killed right before the mark, or after it
            folder.clear()
            return MARK in entries
        return False

    def temporary(self, name: str) -> RemoteFolder:
        """The folder of that name, which is new and bears the mark. Raises CheckpointError."""
        folder = self.folder(name)
        if self.exists(name):
            raise CheckpointError(f"'{folder.path}' is there already: let only one job write there")
        if MARK in folder.entries():
            folder.clear()
        folder.make()
        folder.put(MARK, b"")
        return folder

    def commit(self, temporary: Folder, name: str, manifest: bytes) -> RemoteFolder:
        """Make a written folder a checkpoint by its manifest. Raises CheckpointError, also if there is one by now."""
        folder = self.folder(name)
        if MANIFEST in folder.entries():
            raise CheckpointError(
                f"'{folder.path}' has appeared while it was being saved: let only one job write there"
            )
        folder.put(MANIFEST, manifest)
        try:
            folder.remove(MARK)
        except (CheckpointError, OSError) as error:  # with its manifest it is a checkpoint all the same
            logger.warning("'%s' keeps its file %s until the next start: %s", folder.path, MARK, error)
        return folder

    def discard(self, temporary: Folder) -> None:
        """Remove a folder that bears the mark. Raises CheckpointError."""
        folder = self.folder(temporary.name)
        if MARK in folder.entries():
            folder.clear()

    def set_aside(self, name: str, why: str) -> str:
        """Copy a checkpoint that is in the way to `step-N.<why>-…`, then delete it; the new name.

        Raises CheckpointError.
        """
        source, aside = self.folder(name), aside_name(name, why)
        sizes = source.sizes()
        foreign = sorted(
            entry for entry, size in sizes.items() if size < 0 or not (entry == MANIFEST or is_plain(entry))
        )
        if MANIFEST not in sizes or foreign:
            what = f"holds {', '.join(foreign)}" if foreign else f"has no {MANIFEST}"
            raise CheckpointError(f"'{source.path}' {what}: Espalier did not write it; move it away")
        target = self.temporary(aside)
        for entry in sorted(sizes, key=lambda entry: entry == MANIFEST):
            with _reaching(source.path):
                files, path = source.at(entry)
                files.cp_file(path, target.at(entry)[1])
        target.remove(MARK)
        self._unmake(source)
        return aside

    def delete(self, name: str) -> None:
        """Remove a checkpoint; a kill leaves it whole or with the mark alone. Raises CheckpointError."""
        folder = self.folder(name)
        if step_of(name) is None or MANIFEST not in folder.entries():
            raise CheckpointError(f"'{folder.path}' is not a checkpoint folder: it is not deleted")
        self._unmake(folder)

    def _unmake(self, folder: RemoteFolder) -> None:
        folder.put(MARK, b"")
        folder.clear()


def _is_manifest(folder: RemoteFolder) -> bool:
    """Whether its manifest is whole: some storage shows a file before all of it is there."""
    try:
        with folder.open(MANIFEST) as file:
            parse(file.read())
    except CheckpointError:
        return False
    return True
