"""A stand-in for an object store, `objects:///folder`: fsspec's interface over a local folder, without any rename.

A file appears, whole, when it is closed. `blow` lets one of its operations fail, or be the last that a process does.
"""

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

PROTOCOL = "objects"
PARTS = "parts"


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so nothing is tidied up."""


@dataclass
class Blow:
    """Operation `number` ends in `failure`: before it is done, after it, or (a file that is closed) halfway."""

    number: int = -1
    failure: BaseException | None = None
    when: str = "before"
    seen: int = 0
    """Operations so far."""
    inside: bool = False
    """Whether one is under way: those that it is made of do not count."""

    def falls(self) -> bool:
        """Whether it falls on the operation that begins now."""
        self.seen += 1
        return self.seen - 1 == self.number

    def strike(self) -> None:
        if self.failure is not None:
            raise self.failure


def counted(name: str) -> Any:
    """The operation of a local file system, which can be met by the blow."""

    def operation(self: "ObjectStore", *args: Any, **kwargs: Any) -> Any:
        blow, real = ObjectStore.blow, getattr(LocalFileSystem, name)
        if blow.inside:
            return real(self, *args, **kwargs)
        falls = blow.falls()
        if falls and blow.when != "after":
            blow.strike()
        blow.inside = True
        try:
            return real(self, *args, **kwargs)
        finally:
            blow.inside = False
            if falls:
                blow.strike()

    return operation


class ObjectStore(LocalFileSystem):
    """The file system. Nothing may use a rename."""

    protocol = PROTOCOL
    blow: ClassVar[Blow] = Blow()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{PROTOCOL}://"))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        return Upload(path) if mode == "wb" else super()._open(path, mode, block_size)

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("an object store cannot rename")

    mkdir, rmdir, rm_file, cp_file = (counted(name) for name in ("mkdir", "rmdir", "rm_file", "cp_file"))
    ls, info = counted("ls"), counted("info")


class Upload(io.BytesIO):
    """A file that is there once it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        blow = ObjectStore.blow
        falls = blow.falls()
        if falls and blow.when == "before":
            blow.strike()
        with open(self._path, "wb") as file:
            file.write(data[: len(data) // 2] if falls and blow.when == "halfway" else data)
        if falls:
            blow.strike()


class PartStore(MemoryFileSystem):
    """Files are uploaded in parts and read through fsspec's cache of blocks, as those of S3 are."""

    protocol = PARTS

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{PARTS}://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with self._open(path, "wb") as file:
            file.write(value)

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, *_: Any, **kwargs: Any) -> Any:
        return PartFile(self, path, mode, block_size or "default", **kwargs)


class PartFile(AbstractBufferedFile):
    """A file of it, while it is written or read."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> Any:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.store[self.path] = MemoryFile(self.fs, self.path, b"".join(self.parts))
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.store[self.path].getvalue()[start:end]


fsspec.register_implementation(PROTOCOL, ObjectStore, clobber=True)
fsspec.register_implementation(PARTS, PartStore, clobber=True)
