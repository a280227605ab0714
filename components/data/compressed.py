"""Decompression in pieces: bounded memory whatever a file claims, and an error where it ends too early.

The file objects of zlib and zstandard were rejected: zstandard's ends silently at a truncated frame. Input goes in by
16 KiB, so that even a file made to expand without measure (a thousandfold in gzip) gives pieces of some megabytes.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

CODECS = (".gz", ".zst")
"""Endings of the names of compressed files."""
PIECE = {"": 1 << 20, ".gz": 1 << 14, ".zst": 1 << 14}
"""Bytes to read at once."""


class Damaged(Exception):
    """Compressed data that are damaged or truncated; raised after all that could be read."""


class _Decompressor(Protocol):
    """What the decompressors of zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def decompressed(pieces: Iterator[bytes], codec: str) -> Iterator[bytes]:
    """Content of a file from its pieces, best of PIECE bytes; never an empty one.

    `codec`: one of CODECS, or empty. Raises Damaged.
    """
    if not codec:
        yield from pieces
        return
    new, error = _codec(codec)
    try:
        yield from filter(None, _members(pieces, new))
    except (EOFError, error) as problem:
        raise Damaged(str(problem)) from problem


def _members(pieces: Iterator[bytes], new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """One or more members, one after another; the last must be complete."""
    stream, begun = new(), False
    for piece in pieces:
        data = piece
        while data:
            yield stream.decompress(data)
            data, begun = b"", not stream.eof
            if stream.eof:
                data, stream = stream.unused_data, new()
    if begun:
        raise EOFError("unexpected end of the compressed data")


def _codec(codec: str) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if codec == ".gz":
        return partial(zlib.decompressobj, wbits=31), zlib.error
    import zstandard

    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
