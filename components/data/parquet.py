"""Parquet files: random access by row group.

Reading one document decodes its row group, so recently used ones are kept, up to a bound in bytes. A shuffled pass over
a corpus far larger than the bound decodes about one row group per document: small row groups (1000 rows) suit it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from components.data.documents import bad_record, files_fingerprint, unreadable
from components.runtime.errors import DataError

CACHE_BYTES = 256 << 20


class Parquet:
    """RandomAccess over the text column of files. Raises DataError: no Parquet file, no such column."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = tuple(files), field
        counts = [_row_groups(x, field) for x in self._files]
        self._groups = [(path, g) for path, rows in zip(self._files, counts, strict=True) for g in range(len(rows))]
        self._first_row = np.array([first for rows in counts for first in np.cumsum([0, *rows])[:-1]])  # in its file
        self._ends = np.cumsum([n for rows in counts for n in rows])  # (groups,) first document after each group
        if not len(self._ends) or not self._ends[-1]:
            raise DataError(
                f"{self._files[0]}: no rows in {len(self._files)} file(s); give a dataset that is not empty"
            )
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self.fingerprint: dict[str, Any] = files_fingerprint(self._files) | {"text_field": field}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def document(self, index: int) -> str:
        """Text in row `index`, counted over all files. Raises BadRecord if it is null or not UTF-8."""
        group, row = self._find(index)
        path, line = self._groups[group][0], int(self._first_row[group]) + row + 1
        try:
            text = self._column(group)[row].as_py()
        except UnicodeDecodeError as error:
            what = f"column {self._field!r} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
            raise bad_record(path, line, 1, what) from error
        if text is None:
            raise bad_record(path, line, 1, f"column {self._field!r} is null in this row")
        return text

    def place(self, index: int) -> str:
        """File and row of a document."""
        group, row = self._find(index)
        return f"{self._groups[group][0]}:{int(self._first_row[group]) + row + 1}"

    def _find(self, index: int) -> tuple[int, int]:
        """Row group of a document, and its row in there."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _column(self, group: int) -> Any:
        """The text column of a row group, as an Arrow array."""
        if group not in self._cache:
            path, number = self._groups[group]
            # No threads: this also runs in forked workers, which do not inherit Arrow's pool.
            with _readable(path):
                table = _open(path).read_row_group(number, columns=[self._field], use_threads=False)
            self._cache[group] = table.column(0)
            while len(self._cache) > 1 and sum(x.nbytes for x in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def _open(path: Path) -> Any:
    import pyarrow.parquet

    with _readable(path):
        return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises DataError for what Arrow raises over a file that has gone or is damaged."""
    import pyarrow

    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except (pyarrow.ArrowException, IndexError) as error:  # IndexError: of fewer row groups than before
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a Parquet file, or damaged ({reason}); write it again") from error


def _row_groups(path: Path, field: str) -> list[int]:
    """Rows of each row group. Raises DataError if the file has no such column of text."""
    import pyarrow.types as types

    file = _open(path)
    schema = file.schema_arrow
    if field not in schema.names:
        raise DataError(
            f"{path}: no column {field!r} (columns: {', '.join(schema.names)}); set data.text_field to one of them"
        )
    kind = schema.field(field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(f"{path}: column {field!r} holds {kind}, not text; set data.text_field to a column of strings")
    return [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
