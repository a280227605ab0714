"""The records of a chunk: the texts of each key, or what is wrong with a record and where.

Lines are parsed by the standard library's json, which takes less than a hundredth of what encoding takes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from components.data.compressed import PIECE, Damaged, decompressed
from components.data.documents import BOM
from components.data.jsonlines import is_blank
from components.data.preprocess.inputs import LINES, ROWS, Chunk, kind_of
from components.data.preprocess.parquet import columns_of
from components.data.watch import DataFile, LocalFile, chunks

Texts = str | list[str]
"""What a key holds: a text, or a list of texts that become the sequences of one document."""


@dataclass(frozen=True)
class Bad:
    """A record that holds no document."""

    kind: str
    """One of a few names, to be counted under."""
    what: str
    """What is wrong, in words."""
    place: str
    """Where: complete, or the file where `line` is given."""
    line: int | None = None
    """Lines of the chunk before the record's, where the chunk does not know those before itself."""
    column: int = 1
    """From 1, in characters."""

    def where(self, before: int) -> str:
        """`file:line:column`, or row group and row. `before`: lines of the file before the chunk."""
        return self.place if self.line is None else f"{self.place}:{before + self.line + 1}:{self.column}"


def records(chunk: Chunk, keys: Sequence[str]) -> Iterator[list[Texts] | Bad]:
    """The records of a chunk in order, each with the texts of `keys`. Raises DataError: a file that cannot be read."""
    if chunk.kind == LINES:
        return _lines(chunk, keys)
    return _rows(chunk, keys) if chunk.kind == ROWS else _files(chunk)


def lines_of(chunk: Chunk, raw: bytes) -> int:
    """Lines that end in a chunk."""
    return raw.count(b"\n") if chunk.kind == LINES else 0


def content(chunk: Chunk) -> bytes:
    """The bytes of a chunk of lines or rows. Raises DataError."""
    raw, file = chunk.raw, chunk.files[0]
    if raw is None and isinstance(file, LocalFile):
        raw = file.read(chunk.start, chunk.stop)
    if raw is None:
        raise ValueError(f"{chunk}: only local files of lines are read in pieces")
    return raw


def _lines(chunk: Chunk, keys: Sequence[str]) -> Iterator[list[Texts] | Bad]:
    path, number = str(chunk.files[0]), 0
    lines = content(chunk).split(b"\n")
    if chunk.damage:
        lines.pop()  # cut somewhere
    for number, line in enumerate(lines):
        if not is_blank(line):
            yield _parsed(line, keys, path, number)
    if chunk.damage:
        what = f"the compressed file is damaged or truncated from here on ({chunk.damage})"
        yield Bad("damaged file", what, path, len(lines))


def _parsed(line: bytes, keys: Sequence[str], path: str, number: int) -> list[Texts] | Bad:
    """The texts of one line."""
    line = line.removeprefix(BOM)
    try:
        text = str(line, "utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        return Bad("not UTF-8", f"not UTF-8 (byte 0x{line[error.start]:02x})", path, number, column)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        kind = "truncated JSON" if cut else "not valid JSON"
        return Bad(kind, f"{kind} ({error.msg})", path, number, error.colno)
    except RecursionError:
        return Bad("not valid JSON", "JSON that is nested too deeply", path, number)
    except ValueError:  # Python's limit: longer ones take time that grows with the square of their length
        return Bad("not valid JSON", "JSON with a number of too many digits", path, number)
    if not isinstance(record, dict):
        what = f"a record must be an object with fields, not {type(record).__name__}"
        return Bad("not an object", what, path, number)
    return _fields(record, keys, path, number)


def _fields(record: dict[str, Any], keys: Sequence[str], path: str, number: int | None) -> list[Texts] | Bad:
    found: list[Texts] = []
    for key in keys:
        value = record.get(key)
        if not _is_texts(value):
            return _unfit(record, key, path, number)
        found.append(value)
    return found


def _is_texts(value: Any) -> TypeGuard[Texts]:
    """A text or a list of texts, without halves of surrogate pairs, which are no characters."""
    if isinstance(value, list):
        return all(isinstance(x, str) and _is_whole(x) for x in value)
    return isinstance(value, str) and _is_whole(value)


def _is_whole(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()  # the quickest way to look at all characters
    except UnicodeEncodeError:
        return False
    return True


def _unfit(record: dict[str, Any], key: str, path: str, number: int | None) -> Bad:
    """What is wrong with the value of a key."""
    if key not in record:
        there = ", ".join(repr(x) for x in record) or "none"
        return Bad("no such field", f"no field {key!r} (fields: {there}; --keys names those to encode)", path, number)
    value = record[key]
    if value is None:
        return Bad("null", f"field {key!r} is null", path, number)
    texts = value if isinstance(value, list) else [value]
    others = [x for x in texts if not isinstance(x, str)]
    if others:
        within = "a list with " if isinstance(value, list) else ""
        return Bad("not text", f"field {key!r} is {within}{type(others[0]).__name__}, not text", path, number)
    what = f"field {key!r} holds half of a surrogate pair, which is no character"
    return Bad("half of a surrogate pair", what, path, number)


def _rows(chunk: Chunk, keys: Sequence[str]) -> Iterator[list[Texts] | Bad]:
    columns = columns_of(content(chunk))
    group, first = chunk.group
    for row in range(chunk.stop - chunk.start):
        place = f"{chunk.files[0]}: row group {group}, row {chunk.start + row - first} of it (both from 0)"
        try:
            record = {key: column[row].as_py() for key, column in zip(keys, columns, strict=True)}
        except UnicodeDecodeError as error:
            yield Bad("not UTF-8", f"not UTF-8 (byte 0x{error.object[error.start]:02x})", place)
            continue
        yield _fields(record, keys, place, None)


def _files(chunk: Chunk) -> Iterator[list[Texts] | Bad]:
    """One document a file."""
    for path in chunk.files:
        try:
            yield [_whole(path)]
        except Damaged as error:
            yield Bad("damaged file", f"the compressed file is damaged or truncated ({error})", f"{path}:1:1")
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode("utf-8")
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            what = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
            yield Bad("not UTF-8", what, f"{path}:{line}:{column}")


def _whole(file: DataFile) -> str:
    """Text of a file. Raises Damaged, UnicodeDecodeError, and DataError if it cannot be read."""
    codec = kind_of(file.name)[1]
    raw = b"".join(decompressed(chunks(file, PIECE[codec]), codec))
    return raw.removeprefix(BOM).decode("utf-8")
