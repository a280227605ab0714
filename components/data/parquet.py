"""Parquet files: random access by row group.

Reading one document decodes its row group, so recently used ones are kept, up to a bound in bytes. A shuffled pass over
a corpus far larger than the bound decodes about one row group per document: small row groups (1000 rows) suit it.
"""

from collections import OrderedDict
from collections.abc import Sequence
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
        """Text in row `index`, counted over all files. Raises BadRecord if it is null."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        text = self._column(group)[row].as_py()
        if text is None:
            line = int(self._first_row[group]) + row + 1
            raise bad_record(self._files_of(group), line, 1, f"column {self._field!r} is null in this row")
        return text

    def _files_of(self, group: int) -> Path:
        return self._groups[group][0]

    def _column(self, group: int) -> Any:
        """The text column of a row group, as an Arrow array."""
        if group not in self._cache:
            path, number = self._groups[group]
            # No threads: this also runs in forked workers, which do not inherit Arrow's pool.
            table = _open(path).read_row_group(number, columns=[self._field], use_threads=False)
            self._cache[group] = table.column(0)
            while len(self._cache) > 1 and sum(x.nbytes for x in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a Parquet file, or damaged ({str(error).splitlines()[0]}); write it again"
        ) from error


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
