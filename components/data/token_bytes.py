"""The bytes of a token file: mapped where it is local, read by ranges through fsspec where it is a URL.

Reading a mapping beyond the end of its file kills the process (SIGBUS), and a file that was replaced goes on under its
old index as nonsense. So the file is looked at before each access: same inode, size and time as at opening, or a
DataError. The price is one `stat`, about a microsecond; what is left is a file that shrinks within that microsecond.
Reading by `pread` was rejected: it is no faster, and its copies are private where mapped pages are shared by all ranks
of a host.

Remote files are compared once in each process; after that the handle is fsspec's, with blocks cached in it (S3's ask
for the same ETag at each range).
"""

import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from components.data.documents import shrunk, unreadable
from components.runtime.errors import DataError

BLOCK, BLOCKS = 1 << 22, 8  # of a remote file: bytes that are fetched at once, and how many of them are kept
Identity = tuple[int | str, ...]


class TokenBytes(Protocol):
    """Random access to one file. Survives pickling and a fork; a copy refuses a file that has changed since."""

    name: str
    """Path or URL, for messages."""
    size: int
    """Bytes in it."""

    def check(self) -> None:
        """Raises DataError if the file is not what it was."""
        ...

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """Elements from byte `offset` on, perhaps a view of the file: copy it, or `check` before each use.

        Raises DataError. # (count,)
        """
        ...

    def blocks(self, offsets: list[int], size: int) -> list[bytes]:
        """Up to `size` bytes from each offset. Raises DataError."""
        ...


class LocalBytes:
    """TokenBytes of a local file. Raises DataError if it cannot be read."""

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self._identity = self._look()
        self.size = int(self._identity[0])
        self._map: mmap.mmap | bytes | None = None

    def check(self) -> None:
        """See TokenBytes."""
        if self._look() != self._identity:
            raise shrunk(self.name)

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """See TokenBytes."""
        if self._map is None:
            self._map = self._open()
        self.check()
        if offset + count * dtype.itemsize > self.size:
            raise shrunk(self.name)
        return np.frombuffer(self._map, dtype, count, offset) if count else np.empty(0, dtype)

    def blocks(self, offsets: list[int], size: int) -> list[bytes]:
        """See TokenBytes."""
        one = np.dtype(np.uint8)
        return [self.array(one, x, min(size, self.size - x)).tobytes() for x in offsets]

    def _look(self) -> Identity:
        try:
            found = os.stat(self.name)
        except OSError as error:
            raise unreadable(self.name, error) from error
        return found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns

    def _open(self) -> mmap.mmap | bytes:
        """The mapping, made when it is first needed: thousands of files may be named, and each costs a descriptor."""
        try:
            with open(self.name, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise shrunk(self.name)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise unreadable(self.name, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


class RemoteBytes:
    """TokenBytes of a URL that fsspec knows. `whole`: fetch everything when the first byte is asked for.

    Raises DataError if it cannot be read.
    """

    def __init__(self, url: str, *, whole: bool = False) -> None:
        self.name, self._whole = url, whole
        self._identity = self._look()
        self.size = int(self._identity[0])
        self._handle: Any = None
        self._content: bytes | None = None
        self._process = 0

    def check(self) -> None:
        """Only when a process opens the file; see the module."""
        if self._process == os.getpid():
            return
        if self._look() != self._identity:
            raise shrunk(self.name)
        self._handle, self._process = None, os.getpid()

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """See TokenBytes."""
        self.check()
        raw = self._read(offset, count * dtype.itemsize)
        if len(raw) < count * dtype.itemsize:
            raise shrunk(self.name)
        return np.frombuffer(raw, dtype, count) if count else np.empty(0, dtype)

    def blocks(self, offsets: list[int], size: int) -> list[bytes]:
        """See TokenBytes. All at once, where the store can."""
        from fsspec.core import url_to_fs

        self.check()
        try:
            store, path = url_to_fs(self.name)
            ends = [min(x + size, self.size) for x in offsets]
            return [bytes(x) for x in store.cat_ranges([path] * len(offsets), offsets, ends, on_error="raise")]
        except OSError as error:
            raise unreadable(self.name, error) from error

    def _read(self, offset: int, size: int) -> bytes | memoryview:
        if self._content is not None:
            return memoryview(self._content)[offset : offset + size]
        try:
            if self._handle is None:
                self._handle = self._open()
            if self._whole:
                self._content = self._handle.read()
                return self._read(offset, size)
            self._handle.seek(offset)
            return self._handle.read(size)
        except OSError as error:
            raise unreadable(self.name, error) from error

    def _open(self) -> Any:
        from fsspec.core import url_to_fs

        store, path = url_to_fs(self.name)
        kept = {"maxblocks": BLOCKS}
        return store.open(path, "rb", block_size=BLOCK, cache_type="blockcache", cache_options=kept)

    def _look(self) -> Identity:
        from fsspec.core import url_to_fs

        try:
            store, path = url_to_fs(self.name)
            info = store.info(path)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{self.name}: cannot be read ({error}); check the URL and its credentials") from error
        version = (info.get(x) for x in ("ETag", "etag", "mtime", "LastModified", "updated", "created"))
        return int(info["size"] or 0), next((str(x) for x in version if x), "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_content": None, "_process": 0}


def open_bytes(path: str, *, whole: bool = False) -> TokenBytes:
    """The bytes at a path or URL. `whole`: they will all be needed. Raises DataError."""
    if path.startswith("file://"):
        return LocalBytes(path.removeprefix("file://"))
    return RemoteBytes(path, whole=whole) if is_url(path) else LocalBytes(path)


def is_url(path: str) -> bool:
    """Whether fsspec is to read it. Windows' drive letters are no protocols."""
    return "://" in path
