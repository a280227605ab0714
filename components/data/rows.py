"""The contract between whatever makes rows and the loader that deals them to ranks and workers.

A RowSource has a fixed number of streams; row r of every batch comes from stream r, and a stream goes on from a cursor
of a few integers. That is all a layout, a worker count or a resume needs to know: they only re-deal streams.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from components.mesh.batch import IGNORE

Cursor = tuple[int, ...]
"""Where a stream goes on. The source says what the integers mean; a checkpoint holds nothing else of it."""

Ending = Literal["repeat", "stop", "pad"]
"""Streams never end; or all end with the first; or those that ended are padded until the last has."""


class Row(NamedTuple):
    """One row, the fields of a Batch. # each (seq,) int64"""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    document_ids: np.ndarray


@dataclass
class Counts:
    """What one copy of a source has done so far."""

    dropped_documents: int = 0
    """Documents that were left out since they are longer than a row."""
    targetless_documents: int = 0
    """Documents that were left out since a loss is taken at none of their tokens, or none that truncating left."""
    padding_tokens: int = 0
    """Places of rows that no document filled."""
    row_tokens: int = 0
    """Places of rows, filled or not."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records that could not be read, for each source by its name; 0 too."""

    def fresh(self) -> "Counts":
        """Of the same sources, before anything was done."""
        return Counts(skipped=dict.fromkeys(self.skipped, 0))

    def copy(self) -> "Counts":
        """The numbers as they are now."""
        return replace(self, skipped=dict(self.skipped))


class RowSource(Protocol):
    """Makes rows. Must survive pickling or a fork, since loader workers get a copy."""

    kind: str
    """`streamed` or `indexed`; a saved state fits only the same kind."""
    ending: Ending
    """What happens at the end of the data."""
    seq_len: int
    """Tokens in a row."""
    counts: Counts
    """Of this copy of the source."""

    @property
    def streams(self) -> int:
        """Number of streams: at least the rows of a batch."""
        ...

    @property
    def ends(self) -> bool:
        """Whether there is a last row."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the meaning of a cursor depends on, as JSON values."""
        ...

    def start(self) -> list[Cursor]:
        """The cursor that each stream begins with."""
        ...

    def resume(self, table: Sequence[Sequence[int]]) -> list[Cursor]:
        """The cursor of each stream, from the table of a saved state. Raises DataError if it does not fit."""
        ...

    def open(self, cursors: Mapping[int, Cursor]) -> list[Iterator[tuple[Row, Cursor]]]:
        """For each stream named, in that order: its rows from its cursor on, each with the cursor after it."""
        ...


@runtime_checkable
class Mixed(Protocol):
    """A row source that knows how much it has taken of which source."""

    def mixture(self, table: Sequence[Sequence[int]]) -> dict[str, int]:
        """Tokens or documents, whatever weights are shares of, of each source by name, up to the cursors of a table."""
        ...


def make_row(
    tokens: np.ndarray,
    document_ids: np.ndarray,
    seq_len: int,
    *,
    document_mask: bool,
    cross_document_labels: bool = False,
    targets: np.ndarray | None = None,
) -> Row:
    """A row from up to seq + 1 tokens, the last of which is only a label, and the documents that they belong to.

    `document_ids` count from 0. Labels that are another document's first token are IGNORE, unless
    `cross_document_labels`; so are those that `targets` (bool, as many as tokens; None: all) says no loss is taken at.
    With `document_mask` positions restart at each border; a document that the row's start cuts begins at position 0
    too, since what stood before it is not visible. Missing tokens are filled by 0, as a document of their own without
    labels. # all (at most seq + 1,), tokens and ids int64
    """
    missing = seq_len + 1 - len(tokens)
    if missing:
        tokens = np.concatenate([tokens, np.zeros(missing, np.int64)])
        document_ids = np.concatenate([document_ids, np.full(missing, document_ids[-1] + 1)])
    ids, labels, positions = document_ids[:-1], tokens[1:].copy(), np.arange(seq_len)
    last = np.flatnonzero(document_ids[1:] != ids)  # tokens of their documents; indices are faster than a mask
    if not cross_document_labels:
        labels[last] = IGNORE
    if targets is not None:
        labels[: len(targets) - 1][~targets[1:]] = IGNORE
    labels[seq_len - missing :] = IGNORE
    if document_mask:
        begins = np.concatenate([[0], last[last < seq_len - 1] + 1])
        positions -= begins[ids]
    return Row(tokens[:-1], labels, positions, ids)


def padding_row(seq_len: int) -> Row:
    """A row without labels."""
    zeros = np.zeros(seq_len, np.int64)
    return Row(zeros, np.full(seq_len, IGNORE), np.arange(seq_len), zeros)
