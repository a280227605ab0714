"""Indexed rows: row n of the job is a pure function of n. Row r of step t is n = t·B + r; the state is the next n.

The first index is `synthetic`, which needs neither files nor a tokenizer; token files on disk are another RowIndex.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from components.data.order import SYNTHETIC, raw_bits
from components.data.origins import Listener, TracedIndex
from components.data.rows import Counts, Cursor, Ending, Row, make_row
from components.runtime.errors import DataError


@runtime_checkable
class RowIndex(Protocol):
    """Rows by number."""

    count: int | None
    """Number of rows; None: endless."""
    seq_len: int
    """Tokens in a row."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the content of row n depends on besides n, as JSON values."""
        ...

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of row n, and the document of each, counted from 0. # both (seq + 1,) int64"""
        ...


@runtime_checkable
class MixedIndex(Protocol):
    """A RowIndex over several sources, which knows how much a row takes from each."""

    def mixture(self, rows: int) -> dict[str, int]:
        """Tokens or documents, whatever weights are shares of, of each source by name in the first `rows` rows."""
        ...


class SyntheticRows:
    """Uniform tokens in documents of geometric length, mean a quarter row: for benchmarks and the dry run."""

    count: int | None = None

    def __init__(self, seed: int, vocab_size: int, seq_len: int, *, validation: bool = False) -> None:
        self._seed, self._vocab, self._split = seed, vocab_size, int(validation)
        self.seq_len = seq_len
        split = "validation" if validation else "train"
        self.fingerprint: dict[str, Any] = {"synthetic": split, "vocab_size": vocab_size, "seed": seed}

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See RowIndex."""
        length = self.seq_len + 1
        bits = raw_bits(self._seed, n, self._split, SYNTHETIC, 2 * length)
        ends = bits[length:-1] % np.uint64(max(2, self.seq_len // 4)) == 0
        ids = np.concatenate([[0], np.cumsum(ends)])
        return (bits[:length] % np.uint64(self._vocab)).astype(np.int64), ids


class IndexedRows:
    """RowSource over a RowIndex."""

    kind = "indexed"

    def __init__(
        self,
        index: RowIndex,
        *,
        global_batch: int,
        document_mask: bool,
        ending: Ending,
        cross_document_labels: bool = False,
    ) -> None:
        self._index, self._mask, self._cross = index, document_mask, cross_document_labels
        self.streams, self.seq_len, self.counts = global_batch, index.seq_len, Counts()
        self.ending: Ending = ending
        self.listener: Listener | None = None
        self.fingerprint: dict[str, Any] = index.fingerprint | {
            "seq_len": self.seq_len,
            "document_mask": document_mask,
            "cross_document_labels": cross_document_labels,
        }

    @property
    def ends(self) -> bool:
        """Whether there is a last row, and rows do not begin again after it."""
        return self._index.count is not None and self.ending != "repeat"

    def start(self) -> list[Cursor]:
        """Row r of the first batch is row r."""
        return self._from(0)

    def resume(self, table: Sequence[Sequence[int]]) -> list[Cursor]:
        """From the next row of the first stream, whatever the batch was. Raises DataError for an empty table."""
        if not table or len(table[0]) != 1:
            raise DataError("the saved loader state holds no row number; start from another checkpoint")
        return self._from(int(table[0][0]))

    def mixture(self, table: Sequence[Sequence[int]]) -> dict[str, int]:
        """See Mixed; empty if the index knows of no sources."""
        return self._index.mixture(int(table[0][0])) if isinstance(self._index, MixedIndex) else {}

    def _from(self, first: int) -> list[Cursor]:
        return [(first + r,) for r in range(self.streams)]

    def open(self, cursors: Mapping[int, Cursor]) -> list[Iterator[tuple[Row, Cursor]]]:
        """See RowSource."""
        return [self._rows(cursor[0]) for cursor in cursors.values()]

    def _rows(self, n: int) -> Iterator[tuple[Row, Cursor]]:
        count = self._index.count
        while count is None or n < count or self.ending == "repeat":
            made = n if count is None else n % count
            tokens, ids = self._index.row(made)
            n += self.streams
            self.counts.row_tokens += self.seq_len
            if self.listener is not None:
                self.listener(self._index.origins(made) if isinstance(self._index, TracedIndex) else None)
            row = make_row(tokens, ids, self.seq_len, document_mask=self._mask, cross_document_labels=self._cross)
            yield row, (n,)
