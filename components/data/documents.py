"""What a document source is: a corpus in its natural order, either with random access or only from front to back.

Records are parsed as late as possible, by whoever packs them: a rank that passes over other ranks' documents pays for
reading them, not for parsing, and a bad record stops only the stream that it belongs to.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from components.runtime.errors import DataError

BOM = b"\xef\xbb\xbf"
"""Byte order mark, which some programs put before UTF-8 text."""
MEND = 'mend the record, or skip such records with data.on_bad_record = "skip"'
Record = str | Mapping[str, Any] | np.ndarray
"""One document as its source holds it: text, fields by name, or token ids (int64). An encoder makes tokens of it."""

Read = Callable[[], Record]
"""Parses one record; raises BadRecord."""


class BadRecord(DataError):
    """One record that holds no readable document. `data.on_bad_record` decides whether it stops the run."""

    harmless = False
    """Skip it in any case: the source is known to hold such records."""


@runtime_checkable
class RandomAccess(Protocol):
    """Documents that can be read in any order, by any process (handles are opened per read, so that a fork is safe)."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the documents, as JSON values; cheap, so without reading them."""
        ...

    def __len__(self) -> int:
        """Number of documents, the unreadable ones included."""
        ...

    def document(self, index: int) -> Record:
        """One document. Raises BadRecord."""
        ...


@runtime_checkable
class Sequential(Protocol):
    """Documents that can only be read from front to back; how many there are shows at the end of a pass."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """As in RandomAccess."""
        ...

    def records(self, start: int) -> Iterator[Read]:
        """One pass over the records from number `start` on. Raises DataError."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A source that can tell whether its files still are what they were when it was opened."""

    def check(self) -> None:
        """Raises DataError if one has changed or vanished; takes a system call a file."""
        ...


def check_unchanged(source: object) -> None:
    """Let a source look at its files, if it can. To be called when an epoch begins."""
    if isinstance(source, Watched):
        source.check()


@runtime_checkable
class Placed(Protocol):
    """A source with random access, or a record of another, that can say where a document stands."""

    def place(self, index: int) -> str:
        """`file:line` of document `index`; a record knows its own."""
        ...


def place_of(source: object, index: int) -> str:
    """Where a document stands, for messages."""
    return source.place(index) if isinstance(source, Placed) else f"document {index} of the dataset, counted from 0"


@dataclass(frozen=True)
class DatasetRequest:
    """What a registered dataset is opened with."""

    path: str | None
    """`dataset_path` of the section; None: the place that the name stands for."""
    text_field: str
    """Field that holds a document's text."""
    seq_len: int
    """Tokens in a row, for datasets that make rows themselves."""
    vocab_size: int
    """Entries of the model's vocabulary, likewise."""
    seed: int
    """The job's seed, likewise."""
    validation: bool
    """Opened for validation: the default split of a dataset that has several is the held-out one."""
    fields: Sequence[str] | None = None
    """Fields that will be read of each record, for files that need not be read whole; None: all."""
    split: str | None = None
    """Name of the split of a dataset that has several; None: see `validation`."""
    subset: str | None = None
    """Name of the subset (configuration) of a dataset that has several."""


def bad_record(path: object, line: int, column: int, what: str) -> BadRecord:
    """The error for a record; line and column count from 1, columns in characters."""
    return BadRecord(f"{path}:{line}:{column}: {what}; {MEND}")


def decode(raw: bytes, path: object, line: int) -> str:
    """UTF-8 text of bytes that start at `line`, without a BOM. Raises BadRecord at the first byte that is none."""
    raw = raw.removeprefix(BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        column = len(before) - (before.rfind("\n") + 1) + 1
        raise bad_record(
            path, line + before.count("\n"), column, f"not UTF-8 (byte 0x{raw[error.start]:02x})"
        ) from error


def record_of(parsed: object, path: object, line: int) -> dict[str, Any]:
    """What was parsed, if it is an object with fields. Raises BadRecord."""
    if not isinstance(parsed, dict):
        raise bad_record(path, line, 1, f"a record must be an object with fields, not {type(parsed).__name__}")
    return parsed


def unreadable(path: object, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


def digest_of(sizes: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Number, size in all, and digest of the names and sizes of files."""
    digest = hashlib.sha256("\n".join(f"{size} {name}" for name, size in sizes).encode()).hexdigest()[:16]
    return {"files": len(sizes), "bytes": sum(size for _, size in sizes), "digest": digest}
