"""Token files without an index: nanoGPT's, which are nothing but tokens, and llm.c's, with a header of 1024 bytes.

Where documents lie is found by looking for the token that stands between them, once when the file is opened (about
1 GB/s; 8 bytes a document stay in memory). Keeping the result on disk was rejected, as for JSON lines: an index of its
own makes an indexed token file, which is what `scripts/preprocess_data.py` writes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from components.data.token_bytes import BYTE, TokenBytes, open_bytes
from components.data.token_digest import hash_parts, hash_sample
from components.runtime.errors import DataError

HEADER_BYTES = 1024
HEADERS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
EVALUATION = 20240522
CHUNK = 1 << 22  # tokens that are looked at at once
GUESS = 4096  # bytes by which the dtype of a file without header is told


@dataclass(frozen=True)
class Marks:
    """How documents lie in files without an index."""

    token: int | None = None
    """The token between documents; None: each file is one document."""
    at: Literal["begin", "end"] | None = None
    """Documents begin or end with it. None: they begin with it in files with llm.c's header, and end with it in
    others."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Of tokens in files without a header. None: uint32 if every other number of 16 bits is 0 where the file begins."""


class ShardPart:
    """One `.bin` without `.idx`; each document is one sequence. Raises DataError."""

    def __init__(self, path: str, marks: Marks) -> None:
        self.name = path
        self._bytes = open_bytes(path)
        self._first, self._dtype = _layout(self._bytes, marks)
        self.tokens = (self._bytes.size - self._first) // self._dtype.itemsize
        at = marks.at or ("begin" if self._first else "end")
        self._bounds = self._scan(marks.token, at)  # (documents + 1,)
        self.documents = self.sequences = len(self._bounds) - 1
        self.close()

    def lengths(self) -> np.ndarray:
        """See Part."""
        return np.diff(self._bounds)

    def sequence_lengths(self) -> np.ndarray:
        """See Part."""
        return np.diff(self._bounds)

    def boundaries(self) -> np.ndarray:
        """See Part."""
        return np.arange(self.documents + 1)

    def document(self, index: int) -> tuple[int, int]:
        """See Part."""
        return int(self._bounds[index]), int(self._bounds[index + 1])

    def sequence(self, index: int) -> tuple[int, int]:
        """See Part."""
        return self.document(index)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See Part."""
        offset = self._first + start * self._dtype.itemsize
        return self._bytes.array(self._dtype, offset, stop - start).astype(np.int64)

    def check(self) -> None:
        """See Part."""
        self._bytes.check()

    def close(self) -> None:
        """See Part."""
        self._bytes.close()

    def digest(self) -> bytes:
        """Of all boundaries and a sample of the tokens."""
        return hash_parts([self._dtype.str.encode(), self._bounds.tobytes(), hash_sample(self._bytes)])

    def _scan(self, token: int | None, at: Literal["begin", "end"]) -> np.ndarray:
        """First token of each document, and the number of tokens. Tokens outside marks are a document too."""
        found = [np.array([0, self.tokens])]
        for start in range(0, 0 if token is None else self.tokens, CHUNK):
            count = min(CHUNK, self.tokens - start)
            view = self._bytes.array(self._dtype, self._first + start * self._dtype.itemsize, count)
            found.append(np.flatnonzero(view == token) + start + (at == "end"))
        return np.unique(np.concatenate(found)) if self.tokens else np.zeros(1, np.int64)


def _layout(file: TokenBytes, marks: Marks) -> tuple[int, np.dtype]:
    """Byte of the first token, and the tokens' dtype. Raises DataError."""
    head = np.frombuffer(file.array(BYTE, 0, min(file.size, 12)).tobytes().ljust(12, b"\0"), "<i4")
    magic, version, count = head.tolist()
    if magic == EVALUATION:
        raise DataError(f"{file.name}: llm.c's evaluation data (multiple choice), not documents; take it out")
    if magic not in HEADERS:
        return 0, _headerless(file, marks)
    known, dtype = HEADERS[magic]
    if version != known:
        raise DataError(f"{file.name}: version {version} of llm.c's header {magic}; only {known} is known")
    if count < 0 or file.size != HEADER_BYTES + count * dtype.itemsize:
        raise DataError(
            f"{file.name}: the header says {count} tokens of {dtype.name}, which take"
            f" {HEADER_BYTES + count * dtype.itemsize} bytes with it, but the file has {file.size};"
            " copy it again from where it is whole"
        )
    return HEADER_BYTES, dtype


def _headerless(file: TokenBytes, marks: Marks) -> np.dtype:
    halves = file.array(np.dtype("<u2"), 0, min(file.size, GUESS) // 4 * 2)
    wide = bool(len(halves)) and not halves[1::2].any() and bool(halves[::2].any())
    dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[marks.dtype or ("uint32" if wide else "uint16")])
    if file.size % dtype.itemsize:
        raise DataError(
            f"{file.name}: {file.size} bytes are no whole number of {dtype.name} tokens; it is truncated, or no token"
            " file"
        )
    return dtype
