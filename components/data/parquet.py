"""Parquet files: random access by row group.

Reading one document decodes its row group, so recently used ones are kept, up to a bound in bytes. A shuffled pass over
a corpus far larger than the bound decodes about one row group per document: small row groups (1000 rows) suit it.
Files in storage are read in the same way, a row group with its columns being a few requests.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from components.data.documents import bad_record
from components.data.watch import DataFile, LocalFile, fingerprint_of
from components.runtime.errors import DataError

CACHE_BYTES = 256 << 20


class Parquet:
    """RandomAccess over columns of files; `fields` None: all. Raises DataError: no Parquet file, no such column."""

    def __init__(self, files: Sequence[DataFile], fields: Sequence[str] | None = None) -> None:
        self.files, self._fields = tuple(files), fields
        counts = [_row_groups(x, fields or ()) for x in self.files]
        self._groups = [(file, g) for file, rows in zip(self.files, counts, strict=True) for g in range(len(rows))]
        self._first_row = np.array([first for rows in counts for first in np.cumsum([0, *rows])[:-1]])  # in its file
        self._ends = np.cumsum([n for rows in counts for n in rows])  # (groups,) first document after each group
        if not len(self._ends) or not self._ends[-1]:
            raise DataError(f"{self.files[0]}: no rows in {len(self.files)} file(s); give a dataset that is not empty")
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self.fingerprint: dict[str, Any] = fingerprint_of(self.files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def document(self, index: int) -> dict[str, Any]:
        """Row `index`, counted over all files; lists and structures as Python's. Raises BadRecord if text is not UTF-8.

        Raises DataError if the file has changed; what is kept of a row group is what it was.
        """
        group, row = self._find(index)
        table = self._table(group)
        name, record = "", {}
        try:
            for name, column in table:
                record[name] = column[row].as_py()
        except UnicodeDecodeError as error:
            what = f"column {name!r} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
            raise bad_record(*self._place(group, row), 1, what) from error
        return record

    def place(self, index: int) -> str:
        """File, row group, counted from 0, and row in the file, counted from 1."""
        file, row = self._place(*self._find(index))
        return f"{file}:{row}"

    def check(self) -> None:
        """See Watched."""
        for file in self.files:
            file.check()

    def _place(self, group: int, row: int) -> tuple[str, int]:
        file, number = self._groups[group]
        return f"{file}[row group {number}]", int(self._first_row[group]) + row + 1

    def _find(self, index: int) -> tuple[int, int]:
        """Row group of a document, and its row in there."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _table(self, group: int) -> list[tuple[str, Any]]:
        """The columns of a row group with their names, as Arrow arrays."""
        if group not in self._cache:
            file, number = self._groups[group]
            columns = None if self._fields is None else [*self._fields]
            # No threads: this also runs in forked workers, which do not inherit Arrow's pool.
            with _opened(file) as parquet:
                table = parquet.read_row_group(number, columns=columns, use_threads=False)
            self._cache[group] = (table.nbytes, list(zip(table.column_names, table.columns, strict=True)))
            while len(self._cache) > 1 and sum(size for size, _ in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group][1]


@contextmanager
def _opened(file: DataFile) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Raises DataError."""
    import pyarrow.parquet

    with file.open() as opened, file.guarded(), readable(file):
        yield pyarrow.parquet.ParquetFile(opened)


@contextmanager
def readable(file: DataFile) -> Iterator[None]:
    """Raises DataError for what Arrow raises over a file that is damaged; what the system raises passes."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, IndexError, OSError) as error:  # IndexError: of fewer row groups than before
        if isinstance(error, OSError) and (error.errno is not None or not isinstance(file, LocalFile)):
            raise  # Arrow's own have no number, as those of storage
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file}: not a Parquet file, or damaged ({reason}); write it again") from error


def _row_groups(file: DataFile, fields: Sequence[str]) -> list[int]:
    """Rows of each row group. Raises DataError if the file has no such columns."""
    with _opened(file) as parquet:
        names = parquet.schema_arrow.names
        if missing := [x for x in fields if x not in names]:
            told = f"no column {missing[0]!r} (columns: {', '.join(names)})"
            raise DataError(f"{file}: {told}; set data.text_field, or the key of the source, to one")
        return [parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups)]
