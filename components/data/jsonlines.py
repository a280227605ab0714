"""JSON lines: random access through an index of byte offsets where files are plain, front to back where compressed.

The index is built at start-up by scanning for newlines (about 1 GB/s), and kept in memory (16 bytes a document).
Keeping it on disk was rejected: a stale index is a silent error. Lines that hold nothing are no records.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from components.data.documents import Read, bad_record, decode, files_fingerprint, shrunk, text_of, unreadable
from components.runtime.errors import DataError

CHUNK = 1 << 22
BLANK = (b"", b"\r")


class JsonLines:
    """RandomAccess over plain files. Raises DataError if one cannot be read, or if there is no record at all."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = tuple(files), field
        spans = [_spans(x) for x in self._files]
        self._ends = np.cumsum([len(x) for x in spans])  # (files,) number of the first record after each file
        self._spans = np.concatenate(spans)  # (records, 2) first byte, byte after the last
        if not len(self._spans):
            raise DataError(
                f"{self._files[0]}: no records in {len(self._files)} file(s); give a dataset that is not empty"
            )
        self.fingerprint: dict[str, Any] = files_fingerprint(self._files) | {"text_field": field}

    def __len__(self) -> int:
        return len(self._spans)

    def document(self, index: int) -> str:
        """Text of record `index`. Raises BadRecord with file, line and column."""
        path = self._files[int(np.searchsorted(self._ends, index, side="right"))]
        start, stop = (int(x) for x in self._spans[index])
        raw = _slice(path, start, stop)
        return parse_line(raw, self._field, path, lambda: _line(path, start))

    def place(self, index: int) -> str:
        """File and line of record `index`."""
        path = self._files[int(np.searchsorted(self._ends, index, side="right"))]
        return f"{path}:{_line(path, int(self._spans[index][0]))}"


class JsonLinesStream:
    """Sequential over files of which at least one is compressed (.gz, .zst)."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = tuple(files), field
        self.fingerprint: dict[str, Any] = files_fingerprint(self._files) | {"text_field": field}

    def records(self, start: int) -> Iterator[Read]:
        """Records from number `start` on; those before are not parsed. A damaged file ends with one bad record."""
        return islice((record for path in self._files for record in self._file(path)), start, None)

    def _file(self, path: Path) -> Iterator[Read]:
        number = 0
        try:
            for number, line in enumerate(_lines(_chunks(path)), start=1):
                if line not in BLANK:
                    yield Line(line, self._field, path, number)
        except OSError as error:
            raise unreadable(path, error) from error
        except (EOFError, zlib.error, _zstd_error()) as error:
            yield partial(_damaged, path, number + 1, str(error))


class Line(NamedTuple):
    """A record that was read but not parsed."""

    raw: bytes
    field: str
    path: Path
    number: int

    def __call__(self) -> str:
        """Its text. Raises BadRecord."""
        return parse_line(self.raw, self.field, self.path, lambda: self.number)

    def place(self, index: int) -> str:
        """File and line."""
        return f"{self.path}:{self.number}"


def parse_line(raw: bytes, field: str, path: Path, number: Callable[[], int]) -> str:
    """Text of one line. `number()` gives its number, asked only when it is needed for a message. Raises BadRecord."""
    try:
        return text_of(json.loads(raw), field, path, 0)
    except (ValueError, DataError, RecursionError):
        line = number()
    text = decode(raw, path, line)
    try:
        return text_of(json.loads(text), field, path, line)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = f"{'truncated' if cut else 'not valid'} JSON ({error.msg})"
        raise bad_record(path, line, error.colno, what) from error
    except RecursionError as error:
        raise bad_record(path, line, 1, "JSON that is nested too deeply") from error


def _damaged(path: Path, line: int, why: str) -> str:
    raise bad_record(path, line, 1, f"the compressed file is damaged or truncated from here on ({why})")


def _spans(path: Path) -> np.ndarray:
    """First byte and byte after the last of each line that holds anything. # (lines, 2) int64"""
    newlines, size = [], 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
                size += len(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    stops = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    spans = np.stack([starts, stops], axis=1)
    length = stops - starts
    keep = length > 0
    for i in np.flatnonzero(length == 1):  # a lone carriage return is an empty line too
        keep[i] = _slice(path, int(starts[i]), int(stops[i])) not in BLANK
    return spans[keep]


def _slice(path: Path, start: int, stop: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) < stop - start:
        raise shrunk(path)
    return raw


def _line(path: Path, start: int) -> int:
    """Number of the line that begins at byte `start`, from 1."""
    return _slice(path, 0, start).count(b"\n") + 1


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newlines, the last one too if it has none."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    yield b"".join(rest)


class _Decompressor(Protocol):
    """What the decompressors of zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _chunks(path: Path) -> Iterator[bytes]:
    """Content of a file, decompressed by its extension. Raises EOFError if the compressed data stop early."""
    with path.open("rb") as file:
        raw = iter(partial(file.read, CHUNK), b"")
        if path.suffix not in (".gz", ".zst"):
            yield from raw
            return
        new = _zstd if path.suffix == ".zst" else partial(zlib.decompressobj, wbits=31)
        yield from _decompress(raw, new)


def _decompress(chunks: Iterator[bytes], new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Decompress one or more members; checks that the last is complete, as zstandard's own file object does not."""
    stream, begun = new(), False
    for chunk in chunks:
        data = chunk
        while data:
            yield stream.decompress(data)
            data, begun = b"", not stream.eof
            if stream.eof:
                data, stream = stream.unused_data, new()
    if begun:
        raise EOFError("unexpected end of the compressed data")


def _zstd() -> _Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
