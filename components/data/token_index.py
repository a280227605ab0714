"""Megatron-LM's `PREFIX.idx`: where each document and sequence of `PREFIX.bin` lies, and what may be wrong with it.

Little-endian, no padding: magic (9 bytes), version (u64, 1), dtype code (u8), S sequences (u64), D = documents + 1
(u64); then sequence lengths in tokens (i32[S]), sequence pointers in bytes (i64[S]), document indices (i64[D]: the
sequence that each document starts at, and S), and one mode per sequence (i8[S]) that only the file's size tells of.

Nothing is believed: the counts are compared with the file's size before anything is made of them, and opening checks
every entry (about 10 ms for a million documents), because a wrong pointer reads as plausible tokens of another one.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from components.data.token_bytes import TokenBytes, open_bytes
from components.runtime.errors import DataError

MAGIC, LEGACY, VERSION = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {i: np.dtype(x) for i, x in enumerate(["u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"], start=1)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH, POINTER, MODE = np.dtype("<i4"), np.dtype("<i8"), np.dtype("i1")
CHUNK = 1 << 20  # entries that are checked at once, so that an index of any size is checked in the same memory
REWRITE = "write both files again from the text, or copy both again from where they are whole"


class Header(NamedTuple):
    """What the first 34 bytes say."""

    dtype: np.dtype
    sequences: int
    documents: int
    modes: bool


class Index:
    """An opened `.idx`. Its arrays are views of the file: `check` before each use, copy what is kept.

    Raises DataError for a header that is not Megatron's, or does not fit the file.
    """

    def __init__(self, file: TokenBytes) -> None:
        self.file = file
        head = file.array(np.dtype(np.uint8), 0, min(HEADER.size, file.size)).tobytes()
        self.header = read_header(head, file.size, file.name)

    def check(self) -> None:
        """Raises DataError if the file is not what it was."""
        self.file.check()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence. # (sequences,) int32"""
        return self.file.array(LENGTH, HEADER.size, self.header.sequences)

    @cached_property
    def pointers(self) -> np.ndarray:
        """First byte of each sequence. # (sequences,) int64"""
        return self.file.array(POINTER, HEADER.size + 4 * self.header.sequences, self.header.sequences)

    @cached_property
    def documents(self) -> np.ndarray:
        """First sequence of each document, and the number of sequences. # (documents + 1,) int64"""
        return self.file.array(POINTER, HEADER.size + 12 * self.header.sequences, self.header.documents + 1)

    @cached_property
    def modes(self) -> np.ndarray | None:
        """Mode of each sequence, in multimodal files. # (sequences,) int8"""
        if not self.header.modes:
            return None
        offset = HEADER.size + 12 * self.header.sequences + 8 * (self.header.documents + 1)
        return self.file.array(MODE, offset, self.header.sequences)

    def close(self) -> None:
        """Give back the descriptor; the next access opens the file again."""
        for name in ("lengths", "pointers", "documents", "modes"):
            self.__dict__.pop(name, None)
        self.file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "header": self.header}


def read_header(head: bytes, size: int, name: str) -> Header:
    """The header of an `.idx` of `size` bytes. Raises DataError that says what is wrong, before anything is made."""
    if head.startswith(LEGACY):
        raise DataError(f"{name}: the older TNTIDX format, which is no longer read; preprocess the text again")
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise DataError(f"{name}: not an index of token files: begins with {head[:9]!r}, not {MAGIC!r}; check the path")
    if len(head) < HEADER.size:
        raise DataError(f"{name}: truncated: {size} bytes, but the header alone has {HEADER.size}; {REWRITE}")
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{name}: version {version} of the format; only {VERSION} is known; preprocess the text again")
    if code not in DTYPES:
        known = ", ".join(f"{i} ({dtype})" for i, dtype in DTYPES.items())
        raise DataError(f"{name}: unknown dtype code {code}; allowed: {known}; {REWRITE}")
    if entries == 0:
        raise DataError(f"{name}: the header says 0 document indices, but even no documents have one; {REWRITE}")
    wanted = HEADER.size + 12 * sequences + 8 * entries
    if size not in (wanted, wanted + sequences):
        how = "truncated" if size < wanted else "longer than it says"
        raise DataError(
            f"{name}: {how}: {sequences} sequences and {entries - 1} documents take {wanted} bytes"
            f" ({wanted + sequences} with modes), but the file has {size}; {REWRITE}"
        )
    return Header(DTYPES[code], sequences, entries - 1, size > wanted)


def open_index(prefix: str) -> tuple[Index, TokenBytes]:
    """Index and tokens of `PREFIX.idx` and `PREFIX.bin`, checked. Raises DataError with everything that is wrong."""
    index = Index(_half(prefix, ".idx", ".bin"))
    tokens = _half(prefix, ".bin", ".idx")
    if problems := _problems(index, tokens):
        raise DataError("\n".join(f"{x}; {REWRITE}" for x in problems))
    return index, tokens


def validate(prefix: str) -> None:
    """Check a pair of files as thoroughly as opening does. Raises DataError with everything that is wrong."""
    open_index(prefix)


def _half(prefix: str, suffix: str, other: str) -> TokenBytes:
    """One file of a pair. Raises DataError if it is not there."""
    try:
        return open_bytes(prefix + suffix, whole=suffix == ".idx")
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        mend = (
            ": copy it from where the other came from, or preprocess the text again" if _there(prefix + other) else ""
        )
        raise DataError(
            f"{prefix}{suffix}: no such file; token files are a pair, {prefix}.bin and {prefix}.idx{mend}"
        ) from error


def _there(path: str) -> bool:
    try:
        open_bytes(path)
    except DataError:
        return False
    return True


def _problems(index: Index, tokens: TokenBytes) -> list[str]:
    """What is wrong with the entries. Both files are read once, in pieces."""
    index.check()
    name, header = index.file.name, index.header
    total, found = _sequence_problems(index)
    found += _document_problems(index)
    index.check()
    if not found and total * header.dtype.itemsize != tokens.size:
        how = "shorter" if tokens.size < total * header.dtype.itemsize else "longer"
        found.append(
            f"{tokens.name}: {how} than its index says: {tokens.size} bytes, but {total} tokens of"
            f" {header.dtype.name} take {total * header.dtype.itemsize}"
        )
    return [x if x.startswith(tokens.name) else f"{name}: {x}" for x in found]


def _sequence_problems(index: Index) -> tuple[int, list[str]]:
    """Number of tokens, and the first negative length and wrong pointer."""
    itemsize, total, found = index.header.dtype.itemsize, 0, dict[str, str]()
    for start, lengths in _pieces(index.lengths):
        lengths = lengths.astype(np.int64)
        if len(bad := np.flatnonzero(lengths < 0)):
            found.setdefault("length", f"sequence {start + bad[0]} has the negative length {lengths[bad[0]]}")
            break
        ends = total + np.cumsum(lengths)
        pointers = index.pointers[start : start + len(lengths)]
        wanted = (ends - lengths) * itemsize
        if len(bad := np.flatnonzero(pointers != wanted)):
            i = bad[0]
            found.setdefault(
                "pointer", f"sequence {start + i} points to byte {pointers[i]}, but those before it end at {wanted[i]}"
            )
        total = int(ends[-1])
    return total, list(found.values())


def _document_problems(index: Index) -> list[str]:
    """First boundary that is not in order, and ends that are not those of the sequences."""
    documents, sequences, found = index.documents, index.header.sequences, []
    if documents[0] != 0:
        found.append(f"the first document starts at sequence {documents[0]}, not 0")
    if documents[-1] != sequences:
        found.append(f"the last document ends at sequence {documents[-1]}, but there are {sequences} sequences")
    for start, here in _pieces(documents[:-1]):
        if len(bad := np.flatnonzero(here > documents[start + 1 : start + 1 + len(here)])):
            i = start + int(bad[0])
            found.append(f"document {i} starts at sequence {documents[i]}, but the next one at {documents[i + 1]}")
            break
    return found


def _pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), CHUNK):
        yield start, array[start : start + CHUNK]


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron-LM's rule for the tokens of a vocabulary."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]
