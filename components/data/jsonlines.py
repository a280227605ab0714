"""JSON lines: random access through an index of byte offsets where files are plain and here, else front to back.

The index is built at start-up by scanning for newlines (about 1 GB/s), and kept in memory (16 bytes a document).
Keeping it on disk was rejected: a stale index is a silent error. Lines of nothing but whitespace are no records. Plain
files in storage are streamed: to index them would mean to fetch them whole, and to read a line a request.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import numpy as np

from components.data.compressed import CODECS, PIECE, Damaged, decompressed
from components.data.documents import BOM, Read, bad_record, decode, record_of
from components.data.watch import EVERY, DataFile, LocalFile, chunks, fingerprint_of
from components.runtime.errors import DataError

CHUNK = 1 << 22
SUSPECT = np.array([bytes([x]).isspace() or x == BOM[0] for x in range(256)])
"""Bytes that a line of nothing may begin with."""


class JsonLines:
    """RandomAccess over plain files. Raises DataError if one cannot be read, or if there is no record at all."""

    def __init__(self, files: Sequence[LocalFile]) -> None:
        self.files = tuple(files)
        spans = [_spans(x) for x in self.files]
        self._ends = np.cumsum([len(x) for x in spans])  # (files,) number of the first record after each file
        self._spans = np.concatenate(spans)  # (records, 2) first byte, byte after the last
        if not len(self._spans):
            raise DataError(
                f"{self.files[0]}: no records in {len(self.files)} file(s); give a dataset that is not empty"
            )
        self.fingerprint: dict[str, Any] = fingerprint_of(self.files)

    def __len__(self) -> int:
        return len(self._spans)

    def document(self, index: int) -> dict[str, Any]:
        """Record `index`. Raises BadRecord with file, line and column, DataError if the file has changed."""
        file = self.files[int(np.searchsorted(self._ends, index, side="right"))]
        start, stop = self._spans[index].tolist()
        return parse_line(file.read(start, stop), file, lambda: _line(file, start))

    def place(self, index: int) -> str:
        """File and line of record `index`."""
        file = self.files[int(np.searchsorted(self._ends, index, side="right"))]
        return f"{file}:{_line(file, int(self._spans[index][0]))}"

    def check(self) -> None:
        """See Watched."""
        for file in self.files:
            file.check()


class JsonLinesStream:
    """Sequential over files that are compressed (.gz, .zst) or not."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        self.files = tuple(files)
        self.fingerprint: dict[str, Any] = fingerprint_of(self.files)

    def records(self, start: int) -> Iterator[Read]:
        """Records from number `start` on; those before are not parsed. A damaged file ends with one bad record.

        Raises DataError if a file has changed: looked at when a pass begins, at each file's ends, and now and then.
        """
        self.check()
        return islice((record for file in self.files for record in self._file(file)), start, None)

    def _file(self, file: DataFile) -> Iterator[Read]:
        number = 0
        try:
            for number, line in enumerate(_lines(_content(file)), start=1):
                if number % EVERY == 0:
                    file.check()
                if not is_blank(line):
                    yield Line(line, file, number)
        except Damaged as error:
            file.check()  # one that has just been cut off is no damaged one
            yield partial(_damaged, file, number + 1, str(error))
        file.check()

    def check(self) -> None:
        """See Watched."""
        for file in self.files:
            file.check()


class Line(NamedTuple):
    """A record that was read but not parsed."""

    raw: bytes
    file: object
    number: int

    def __call__(self) -> dict[str, Any]:
        """The record. Raises BadRecord."""
        return parse_line(self.raw, self.file, lambda: self.number)

    def place(self, index: int) -> str:
        """File and line."""
        return f"{self.file}:{self.number}"


def parse_line(raw: bytes, file: object, number: Callable[[], int]) -> dict[str, Any]:
    """The object in one line. `number()` gives its number, asked only when it is needed for a message.

    Raises BadRecord.
    """
    try:
        parsed = json.loads(raw)
        if isinstance(parsed, dict):
            return parsed
    except (ValueError, RecursionError):
        pass  # told below, with the place
    line = number()
    text = decode(raw, file, line)
    try:
        return record_of(json.loads(text), file, line)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = f"{'truncated' if cut else 'not valid'} JSON ({error.msg})"
        raise bad_record(file, line, error.colno, what) from error
    except RecursionError as error:
        raise bad_record(file, line, 1, "JSON that is nested too deeply") from error
    except ValueError as error:  # Python's limit: longer ones take time that grows with the square of their length
        raise bad_record(file, line, 1, "JSON with a number of too many digits") from error


def _damaged(file: object, line: int, why: str) -> NoReturn:
    raise bad_record(file, line, 1, f"the compressed file is damaged or truncated from here on ({why})")


def _spans(file: LocalFile) -> np.ndarray:
    """First byte and byte after the last of each line that holds anything. # (lines, 2) int64"""
    starts, suspect, size, before = list[np.ndarray](), list[np.ndarray](), 0, b"\n"
    for chunk in chunks(file, CHUNK):
        content = np.frombuffer(before + chunk, np.uint8)
        newlines = np.flatnonzero(content[:-1] == ord("\n"))
        starts.append(newlines + size)
        suspect.append(SUSPECT[content[newlines + 1]])
        size, before = size + len(chunk), chunk[-1:]
    edges = np.concatenate([*starts, [size + (before != b"\n")]]).astype(np.int64)
    spans = np.stack([edges[:-1], edges[1:] - 1], axis=1)
    keep = np.ones(len(spans), np.bool_)
    for i in np.flatnonzero(np.concatenate([*suspect, []])):
        first, stop = spans[i].tolist()
        keep[i] = first < stop and not is_blank(file.read(first, stop))
    return spans[keep]


def is_blank(line: bytes) -> bool:
    """Whether it holds nothing but whitespace."""
    rest = line.removeprefix(BOM)
    return not rest or rest.isspace()


def _line(file: LocalFile, start: int) -> int:
    """Number of the line that begins at byte `start`, from 1."""
    return file.read(0, start).count(b"\n") + 1


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


def _content(file: DataFile) -> Iterator[bytes]:
    """Content of a file, decompressed by its extension. Raises Damaged, DataError."""
    codec = next((x for x in CODECS if file.name.endswith(x)), "")
    return decompressed(chunks(file, PIECE[codec]), codec)
