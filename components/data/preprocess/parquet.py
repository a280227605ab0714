"""Parquet files from front to back, in batches of about a megabyte that travel as Arrow streams.

Pages are read as they are needed, not by row group: files with row groups of gigabytes are common, and memory is to
stay bounded. Rows before the position of a resume are decoded again within their row group.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from components.data.parquet import readable
from components.data.watch import DataFile
from components.runtime.errors import DataError

TEXT = ("string", "large_string", "string_view", "null")
"""Names of Arrow's types. Null is that of a column that happens to hold nothing in a file; each row of it is told."""


class Batch(NamedTuple):
    """Consecutive rows of one row group."""

    first: int
    """Number of the first row, in the file."""
    rows: int
    total: int
    """Rows of the file."""
    group: tuple[int, int]
    """Number of the row group, and its first row in the file."""
    raw: bytes
    """An Arrow stream of the columns."""


def batches(source: DataFile, columns: Sequence[str], size: int, start: int) -> Iterator[Batch]:
    """Batches of about `size` bytes, from row `start` on. Raises DataError: no Parquet file, no such columns."""
    with closing(source.open()) as opened, source.guarded(), readable(source):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20)
        _check_columns(source, file.schema_arrow, columns)
        first, total = 0, file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                yield from _group(file, columns, size, start, total, (group, first))
            first += rows


def columns_of(raw: bytes) -> list[Any]:
    """The columns of a batch, as Arrow arrays."""
    import pyarrow

    with pyarrow.ipc.open_stream(raw) as stream:
        return stream.read_next_batch().columns


def _group(
    file: Any, columns: Sequence[str], size: int, start: int, total: int, group: tuple[int, int]
) -> Iterator[Batch]:
    number, first = group
    count = _rows_of(file.metadata.row_group(number), columns, size)
    for batch in file.iter_batches(count, row_groups=[number], columns=list(columns), use_threads=False):
        end = first + batch.num_rows
        step = max(1, batch.num_rows * size // max(batch.nbytes, 1))
        for row in range(max(start, first), end, step):
            part = batch.slice(row - first, step).select(list(columns))
            yield Batch(row, part.num_rows, total, group, _serialized(part))
        first = end


def _rows_of(meta: Any, columns: Sequence[str], size: int) -> int:
    """How many rows of a group take about `size` bytes."""
    described = (meta.column(i) for i in range(meta.num_columns))
    held = sum(x.total_uncompressed_size for x in described if x.path_in_schema.split(".")[0] in columns)
    return max(1, min(meta.num_rows, meta.num_rows * size // max(held, 1)))


def _serialized(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _check_columns(path: DataFile, schema: Any, columns: Sequence[str]) -> None:
    import pyarrow.types as types

    for name in columns:
        if name not in schema.names:
            raise DataError(f"{path}: no column {name!r} (columns: {', '.join(schema.names)}); name others in --keys")
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: has {schema.names.count(name)} columns {name!r}; give them names of their own")
        kind = schema.field(name).type
        kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if str(kind) not in TEXT:
            raise DataError(f"{path}: column {name!r} holds {schema.field(name).type}, not text or lists of texts")
