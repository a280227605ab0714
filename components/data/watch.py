"""Files of data, and whether they still are what they were when the run opened them.

A file that changes under a run makes the order of its data, its index and its fingerprint untrue, so any change ends
the run: also one that only appends, and one that only writes the same bytes again, which nobody could tell apart for
less than reading the file. Looking costs one system call, at each opening and now and then between. Rejected: hashing,
which reads everything; and inotify, which does not see what other machines write.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from components.data.documents import digest_of, unreadable
from components.runtime.errors import DataError

RESTORE = "restore the file as it was"
EVERY = 4096
"""Records of a stream between two looks at its file."""


class Stamp(NamedTuple):
    """What a file was like at one time."""

    size: int
    """Bytes."""
    place: tuple[int, int] | None
    """Device and number of a local file, which another file of that name has not."""
    versions: Mapping[str, str | int | float]
    """When it was written, in nanoseconds; or what its storage says of its version."""


@runtime_checkable
class DataFile(Protocol):
    """A file, here or in storage, that is watched from the time on that it was listed. `str` of it is for messages."""

    @property
    def name(self) -> str:
        """Its name without the folders before it."""
        ...

    @property
    def location(self) -> str:
        """Its whole path with slashes: what it is sorted by, and told from others by."""
        ...

    @property
    def stamp(self) -> Stamp:
        """What it was like when it was listed."""
        ...

    @property
    def content_tag(self) -> str | None:
        """What its storage says of its content, if it says anything: the same for the same bytes."""
        ...

    def open(self) -> BinaryIO:
        """Opened for reading, unchanged. Raises DataError."""
        ...

    def check(self) -> None:
        """Raises DataError if it has changed or vanished."""
        ...

    def guarded(self) -> AbstractContextManager[None]:
        """Around reading what was opened: failures become DataError."""
        ...


class Found(NamedTuple):
    """The files at a path."""

    files: Sequence[DataFile]
    """In sorted order."""
    folder: str
    """That they are all below of, in terms of their locations."""
    everything: bool = False
    """They are all that lies in it, data or not."""

    def names(self) -> list[str]:
        """Their paths below the folder."""
        return [x.location.removeprefix(self.folder).lstrip("/") for x in self.files]


class LocalFile:
    """A DataFile in a folder. Raises DataError if it cannot be seen."""

    __slots__ = ("path", "stamp")
    content_tag: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stamp = _of_stat(path.stat())
        except OSError as error:
            raise unreadable(path, error) from error

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """See DataFile."""
        return self.path.name

    @property
    def location(self) -> str:
        """See DataFile."""
        return self.path.absolute().as_posix()

    def open(self) -> BinaryIO:
        """See DataFile."""
        with self.guarded():
            file = self.path.open("rb")
        try:
            require_same(self, _of_stat(os.fstat(file.fileno())))
        except DataError:
            file.close()
            raise
        return file

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of it. Raises DataError also if there are fewer."""
        with self.guarded():
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                require_same(self, _of_stat(os.fstat(file)))
                os.lseek(file, start, os.SEEK_SET)
                raw = _read_all(file, stop - start)
            finally:
                os.close(file)
        if len(raw) < stop - start:  # it shrank between the two calls
            raise changed(self, "was truncated")
        return raw

    def check(self) -> None:
        """See DataFile."""
        with self.guarded():
            now = self.path.stat()
        require_same(self, _of_stat(now))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """See DataFile."""
        try:
            yield
        except FileNotFoundError as error:
            raise vanished(self) from error
        except OSError as error:
            raise unreadable(self, error) from error


def chunks(file: DataFile, size: int) -> Iterator[bytes]:
    """Its bytes in pieces. Raises DataError."""
    with file.open() as opened:
        while True:
            with file.guarded():
                raw = opened.read(size)
            if not raw:
                return
            yield raw


def require_same(file: DataFile, now: Stamp) -> None:
    """Raises DataError, which says how, unless the file is what it was."""
    was = file.stamp
    shared = was.versions.keys() & now.versions.keys()
    if (was.size, was.place) == (now.size, now.place) and all(was.versions[x] == now.versions[x] for x in shared):
        return
    if was.place != now.place:
        raise changed(file, "was replaced by another")
    if now.size < was.size:
        raise changed(file, f"was truncated from {was.size} to {now.size} bytes")
    if now.size > was.size:
        raise changed(file, f"grew from {was.size} to {now.size} bytes")
    raise changed(file, "was written to")


def changed(file: object, how: str) -> DataError:
    """The error for a file that is no longer what it was."""
    return DataError(f"{file}: {how} while the run read it; {RESTORE}")


def vanished(file: object) -> DataError:
    """The error for a file that is no longer there."""
    return DataError(f"{file}: has vanished while the run read it; {RESTORE}")


def fingerprint_of(files: Sequence[DataFile]) -> dict[str, Any]:
    """Number, size and digest of files by relative names and sizes: a copy elsewhere is the same data.

    Where storage knows the contents, their digest stands beside it.
    """
    parent = os.path.commonpath([str(PurePosixPath(x.location).parent) for x in files])
    found = digest_of([(PurePosixPath(x.location).relative_to(parent).as_posix(), x.stamp.size) for x in files])
    if any(x.content_tag for x in files):
        found["contents"] = digest_of([(x.content_tag or "", 0) for x in files])["digest"]
    return found


def _of_stat(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, (found.st_dev, found.st_ino), {"written": found.st_mtime_ns})


def _read_all(file: int, count: int) -> bytes:
    """Up to `count` bytes; a call gives at most 2 GiB of them."""
    raw = os.read(file, count)
    if len(raw) == count or not raw:
        return raw
    parts = [raw]
    while raw := os.read(file, count - sum(map(len, parts))):
        parts.append(raw)
    return b"".join(parts)
