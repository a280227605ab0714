"""The bytes of a token file: mapped where it is local, read by ranges through fsspec where it is a URL.

Reading a mapping beyond the end of its file kills the process (SIGBUS), and a file that was replaced goes on under its
old index as nonsense. So the file is looked at before each access: same inode, size and time as at opening, or a
DataError. The price is one `stat`, one or two microseconds on a local disk; what is left is a file that shrinks within
that time. Reading by `pread` was rejected: it takes a system call too, and its copies are private, where mapped pages
are shared by all ranks of a host.

Remote files are compared once in each process; after that the handle is fsspec's, with blocks cached in it (that of S3
asks for the same ETag at each range).
"""

import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from components.data.remote import is_remote, list_files, local_path
from components.data.watch import LocalFile, changed
from components.runtime.errors import DataError

BLOCK, BLOCKS = 1 << 22, 8  # of a remote file: bytes that are fetched at once, and how many of them are kept
BYTE = np.dtype(np.uint8)


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

    def close(self) -> None:
        """Give back the descriptor, if it holds one; the next access opens the file again."""
        ...


class LocalBytes:
    """TokenBytes of a local file. Raises DataError if it cannot be read."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = LocalFile(Path(path))
        self._was = (self._file.stamp.size, self._file.stamp.place, self._file.stamp.versions["written"])
        self.size = self._file.stamp.size
        self._map: mmap.mmap | bytes | None = None

    def check(self) -> None:
        """See TokenBytes."""
        try:
            now = os.stat(self.name)
        except OSError:
            return self._file.check()
        if (now.st_size, (now.st_dev, now.st_ino), now.st_mtime_ns) != self._was:
            self._file.check()
        return None

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """See TokenBytes."""
        if self._map is None:
            self._map = self._open()
        self.check()
        if offset + count * dtype.itemsize > self.size:
            raise changed(self.name, f"byte {offset + count * dtype.itemsize} is beyond its end")
        return np.frombuffer(self._map, dtype, count, offset) if count else np.empty(0, dtype)

    def blocks(self, offsets: list[int], size: int) -> list[bytes]:
        """See TokenBytes."""
        return [self.array(BYTE, x, min(size, self.size - x)).tobytes() for x in offsets]

    def close(self) -> None:
        """See TokenBytes."""
        self._map = None

    def _open(self) -> mmap.mmap | bytes:
        with self._file.open() as file, self._file.guarded():
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


class RemoteBytes:
    """TokenBytes of a URL that fsspec knows. `whole`: fetch everything when the first byte is asked for.

    Raises DataError if it cannot be read.
    """

    def __init__(self, url: str, *, whole: bool = False) -> None:
        self.name, self._whole = url, whole
        found = list_files(url).files
        if not found:
            raise DataError(f"{url}: no such file") from FileNotFoundError(url)
        self._file = found[0]
        self.size = self._file.stamp.size
        if self.size < 0:
            raise DataError(f"{url}: its storage does not tell its size, without which no part of it can be read")
        self._handle: Any = None
        self._content: bytes | None = None
        self._process = 0

    def check(self) -> None:
        """Only when a process opens the file; see the module."""
        if self._process == os.getpid():
            return
        self._file.check()
        self._handle, self._process = None, os.getpid()

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """See TokenBytes."""
        self.check()
        wanted = count * dtype.itemsize
        with self._file.guarded():
            raw = self._read(offset, wanted)
        if len(raw) < wanted:
            raise changed(self.name, f"byte {offset + wanted} is beyond its end")
        return np.frombuffer(raw, dtype, count) if count else np.empty(0, dtype)

    def blocks(self, offsets: list[int], size: int) -> list[bytes]:
        """See TokenBytes. All at once, where the storage can."""
        from fsspec.core import url_to_fs

        self.check()
        ends = [min(x + size, self.size) for x in offsets]
        with self._file.guarded():
            store, path = url_to_fs(self.name)
            return [bytes(x) for x in store.cat_ranges([path] * len(offsets), offsets, ends, on_error="raise")]

    def close(self) -> None:
        """See TokenBytes. Nothing: what has been fetched is dear, and connections are fsspec's."""

    def _read(self, offset: int, size: int) -> bytes | memoryview:
        if self._whole:
            self._content = self._open().read() if self._content is None else self._content
            return memoryview(self._content)[offset : offset + size]
        self._handle = self._handle or self._open()
        self._handle.seek(offset)
        return self._handle.read(size)

    def _open(self) -> Any:
        from fsspec.core import url_to_fs

        store, path = url_to_fs(self.name)
        kept = {"maxblocks": BLOCKS}
        return store.open(path, "rb", block_size=BLOCK, cache_type="blockcache", cache_options=kept)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_content": None, "_process": 0}


def open_bytes(path: str, *, whole: bool = False) -> TokenBytes:
    """The bytes at a path or URL. `whole`: they will all be needed. Raises DataError."""
    return RemoteBytes(path, whole=whole) if is_remote(path) else LocalBytes(local_path(path))
