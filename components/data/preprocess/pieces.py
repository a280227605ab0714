"""Token files made of token files: several joined, one divided. Neither reads a text, nor more than a piece at once."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from components.data.remote import local_path
from components.data.shares import share_bounds
from components.data.token_bytes import TokenBytes
from components.data.token_index import Index, open_index
from components.data.token_writer import IndexedWriter
from components.runtime.errors import DataError
from components.runtime.logging import logger

BYTES, DOCUMENTS = 1 << 24, 1 << 16  # that are copied at once, at most, but for one longer document


class Made(NamedTuple):
    """A pair of files that was written."""

    prefix: str
    documents: int
    tokens: int


def merge(prefixes: Sequence[str], output: str, overwrite: bool = False) -> Made:
    """Join pairs of files in the order given. Raises DataError: one that is damaged, or of another dtype."""
    names = [stem(x) for x in prefixes]
    header = open_index(names[0])[0].header
    with IndexedWriter(output, header.dtype, overwrite=overwrite, modes=header.modes) as writer:
        for name in names:
            writer.add_file(name)
    return Made(output, writer.documents, writer.tokens)


def split_shares(prefix: str, output: str, shares: str, names: Sequence[str], overwrite: bool = False) -> list[Made]:
    """Divide by shares such as "98,1,1", in file order, by Megatron-LM's rounding: OUTPUT_NAME for each share.

    Raises ConfigError: shares that are none. Raises DataError: files that are damaged, names that do not fit.
    """
    index, tokens = open_index(stem(prefix))
    parts = len(shares.split(","))
    bounds = [share_bounds(shares, part, index.header.documents, "--shares") for part in range(min(parts, 3))]
    if len(names) < parts or len(set(names)) < len(names):
        raise DataError(f"--names {','.join(names)}: give {parts} different names, one for each share")
    targets = [(f"{output}_{name}", *bound) for name, bound in zip(names, bounds, strict=False)]
    return _divide(index, tokens, targets, overwrite)


def split_documents(prefix: str, output: str, count: int, overwrite: bool = False) -> list[Made]:
    """Divide into pieces of `count` documents, the last maybe fewer: OUTPUT_00000 and on.

    Whoever reads the pieces finds them by a glob. So those of an earlier split that would follow the last new one are
    an error, or with `overwrite` removed once the new ones are written. Raises DataError.
    """
    if count < 1:
        raise DataError(f"--documents {count}: give a number from 1 on")
    index, tokens = open_index(stem(prefix))
    total = index.header.documents
    starts = range(0, total, count)
    targets = [(f"{output}_{i:05d}", start, min(start + count, total)) for i, start in enumerate(starts)]
    earlier = _pieces_from(output, len(targets))
    if earlier and not overwrite:
        raise DataError(
            f"{earlier[0]}.bin: is of an earlier split and would follow the last new piece; choose another --output, or"
            " have such pieces removed with --overwrite"
        )
    _require_none_is(prefix, [*(x for x, _, _ in targets), *earlier], output)
    made = _divide(index, tokens, targets, overwrite)
    _remove(earlier)
    return made


def _pieces_from(output: str, number: int) -> list[str]:
    """Prefixes of the whole pairs OUTPUT_NNNNN that are there, from a number on."""
    folder, name = os.path.split(local_path(output))
    pattern = re.compile(re.escape(name) + r"(_([0-9]{5}))\.idx")
    found = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    ends = [match[1] for x in found if (match := pattern.fullmatch(x)) and int(match[2]) >= number]
    return [f"{output}{end}" for end in ends if os.path.isfile(f"{local_path(output)}{end}.bin")]


def _require_none_is(prefix: str, pieces: Sequence[str], output: str) -> None:
    """Raises DataError if one of the pieces is what they are made of."""
    source = local_path(stem(prefix)) + ".bin"
    for piece in pieces:
        file = local_path(piece) + ".bin"
        if os.path.exists(file) and os.path.exists(source) and os.path.samefile(file, source):
            what = f"{piece} is what shall be divided, and would be replaced or removed; choose another --output"
            raise DataError(f"--output {output}: {what}")


def _remove(prefixes: Sequence[str]) -> None:
    """Remove pairs, the index first: there is never one without its tokens. Raises DataError."""
    for prefix in prefixes:
        try:
            for suffix in (".idx", ".bin"):
                os.remove(local_path(prefix) + suffix)
        except OSError as error:
            why = "a piece of an earlier split, which would follow the new ones; remove it yourself"
            raise DataError(f"{error.filename}: cannot be removed ({error.strerror}): {why}") from error
        logger.warning("%s: removed, a piece of an earlier split that would follow the new ones", prefix)


def stem(path: str) -> str:
    """The prefix of a pair, which one of its files may stand for."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


def _divide(index: Index, tokens: TokenBytes, targets: Sequence[tuple[str, int, int]], overwrite: bool) -> list[Made]:
    if not overwrite:
        there = [f"{x}{suffix}" for x, _, _ in targets for suffix in (".bin", ".idx") if os.path.lexists(x + suffix)]
        if there:
            raise DataError(f"{there[0]}: is there already; choose another --output, or replace it with --overwrite")
    made = []
    for prefix, start, stop in targets:
        with IndexedWriter(prefix, index.header.dtype, overwrite=overwrite, modes=index.header.modes) as writer:
            for first, last in _batches(index, start, stop):
                _copy(index, tokens, first, last, writer)
        made.append(Made(prefix, writer.documents, writer.tokens))
    return made


def _batches(index: Index, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Consecutive documents that have BYTES or fewer, or one."""
    while start < stop:
        edges = _edges(index, start, min(start + DOCUMENTS, stop))
        count = max(1, int(np.searchsorted(edges, edges[0] + BYTES, side="right")) - 1)
        yield start, start + count
        start += count


def _edges(index: Index, start: int, stop: int) -> np.ndarray:
    """First byte of each document, and the byte after the last one. # (stop - start + 1,)"""
    index.check()
    sequences = index.documents[start : stop + 1]
    inside = np.minimum(sequences, max(index.header.sequences - 1, 0))
    if not index.header.sequences:
        return np.zeros(len(sequences), np.int64)
    ends = index.pointers[inside] + index.lengths[inside].astype(np.int64) * index.header.dtype.itemsize
    return np.where(sequences < index.header.sequences, index.pointers[inside], ends)


def _copy(index: Index, tokens: TokenBytes, start: int, stop: int, writer: IndexedWriter) -> None:
    """Append some documents."""
    edges = _edges(index, start, stop)
    first, last = int(index.documents[start]), int(index.documents[stop])
    dtype = index.header.dtype
    ids = tokens.array(dtype, int(edges[0]), int(edges[-1] - edges[0]) // dtype.itemsize)
    modes = None if index.modes is None else index.modes[first:last]
    counts = np.diff(index.documents[start : stop + 1])
    writer.add_documents(ids, index.lengths[first:last], counts, modes)
