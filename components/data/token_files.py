"""Documents that are token ids already: Megatron-LM's `.bin/.idx` pairs, or several of them as one source.

Documents are numbered through all parts, in the order that the parts were given. A part reads its own; what a part is
made of (an index, or marks between documents) nobody else needs to know.
"""

import resource
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from components.data.token_digest import hash_all, hash_parts, hash_sample
from components.data.token_index import open_index
from components.data.token_paths import find_tokens
from components.data.token_shards import Marks, ShardPart
from components.runtime.errors import DataError

ARRAYS = ("lengths", "sequence_lengths", "boundaries")  # made again from the files in a process that needs them


class Part(Protocol):
    """Documents of one file. Each of them is one or more sequences, which lie one after the other."""

    name: str
    """For messages."""
    documents: int
    sequences: int
    tokens: int

    def lengths(self) -> np.ndarray:
        """Tokens of each document. # (documents,) int64"""
        ...

    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence. # (sequences,) int64"""
        ...

    def boundaries(self) -> np.ndarray:
        """First sequence of each document, and the number of sequences. # (documents + 1,) int64"""
        ...

    def document(self, index: int) -> tuple[int, int]:
        """First token of a document, and the one after its last."""
        ...

    def sequence(self, index: int) -> tuple[int, int]:
        """First token of a sequence, and the one after its last."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens. Raises DataError if the files have changed. # (stop - start,) int64"""
        ...

    def check(self) -> None:
        """Raises DataError if a file is not what it was."""
        ...

    def close(self) -> None:
        """Give back descriptors; the next access opens the files again."""
        ...

    def digest(self) -> bytes:
        """Of what the tokens and documents are."""
        ...


class IndexedPart:
    """A checked pair of files. Raises DataError."""

    def __init__(self, prefix: str) -> None:
        self.name = prefix
        self._index, self._bytes = open_index(prefix)
        self._dtype = self._index.header.dtype
        if self._dtype.kind == "f":
            raise DataError(f"{prefix}.idx: holds {self._dtype.name}, which are no token ids")
        self.documents, self.sequences = self._index.header.documents, self._index.header.sequences
        self.tokens = self._bytes.size // self._dtype.itemsize
        self.close()

    def lengths(self) -> np.ndarray:
        """See Part."""
        ends = np.cumsum(self.sequence_lengths())
        return np.diff(np.concatenate([[0], ends])[self.boundaries()])

    def sequence_lengths(self) -> np.ndarray:
        """See Part."""
        self._index.check()
        return self._index.lengths.astype(np.int64)

    def boundaries(self) -> np.ndarray:
        """See Part."""
        self._index.check()
        return self._index.documents.copy()

    def document(self, index: int) -> tuple[int, int]:
        """See Part."""
        self._index.check()
        first, last = self._index.documents[index : index + 2].tolist()
        return self._start(first), self._start(last)

    def sequence(self, index: int) -> tuple[int, int]:
        """See Part."""
        self._index.check()
        return self._start(index), self._start(index + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See Part."""
        return self._bytes.array(self._dtype, start * self._dtype.itemsize, stop - start).astype(np.int64)

    def check(self) -> None:
        """See Part."""
        self._index.check()
        self._bytes.check()

    def close(self) -> None:
        """See Part."""
        self._index.close()
        self._bytes.close()

    def digest(self) -> bytes:
        """Of the whole index and a sample of the tokens."""
        return hash_parts([hash_all(self._index.file), hash_sample(self._bytes)])

    def _start(self, sequence: int) -> int:
        if sequence == self.sequences:
            return self.tokens
        return int(self._index.pointers[sequence]) // self._dtype.itemsize


class TokenFiles:
    """RandomAccess over one or more parts: their documents one after the other.

    Beyond RandomAccess: lengths without reading, parts of documents, and sequences (Megatron-LM's unit of GPT data).
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._used: dict[int, None] = {}  # parts that may be open, the last used last
        self._documents = np.cumsum([0, *(x.documents for x in parts)])
        self._sequences = np.cumsum([0, *(x.sequences for x in parts)])
        self.tokens = sum(x.tokens for x in parts)
        """Tokens in all."""
        if not self.tokens:
            raise DataError(f"{parts[0].name}: no tokens in {len(parts)} file(s); give a dataset that is not empty")

    def __len__(self) -> int:
        return int(self._documents[-1])

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self._sequences[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document. # (documents,) int64"""
        return np.concatenate([x.lengths() for x in self._each()])

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence. # (sequences,) int64"""
        return np.concatenate([x.sequence_lengths() for x in self._each()])

    @cached_property
    def boundaries(self) -> np.ndarray:
        """First sequence of each document, and the number of sequences. # (documents + 1,) int64"""
        starts = [x.boundaries()[:-1] + first for x, first in zip(self._each(), self._sequences, strict=False)]
        return np.concatenate([*starts, self._sequences[-1:]])

    def document(self, index: int) -> np.ndarray:
        """Tokens of a document. Raises DataError if the files have changed. # (tokens,) int64"""
        return self.read(index)

    def read(self, index: int, offset: int = 0, count: int | None = None) -> np.ndarray:
        """`count` tokens of a document from `offset` on; None, or fewer there: to its end. # (≤ count,) int64"""
        part, i = self._find(self._documents, index)
        return _read(part, *part.document(i), offset, count)

    def read_sequence(self, index: int, offset: int = 0, count: int | None = None) -> np.ndarray:
        """The same of a sequence. # (≤ count,) int64"""
        part, i = self._find(self._sequences, index)
        return _read(part, *part.sequence(i), offset, count)

    def place(self, index: int) -> str:
        """File and document in it."""
        part, i = self._find(self._documents, index)
        return f"{part.name}: document {i}"

    def sequence_place(self, index: int) -> str:
        """File and sequence in it."""
        part, i = self._find(self._sequences, index)
        return f"{part.name}: sequence {i}"

    def check(self) -> None:
        """See Watched."""
        for part in self._parts:
            part.check()

    @cached_property
    def content_key(self) -> str:
        """Digest of what the documents are: whole indices, sampled tokens. Wherever the files lie, and when made."""
        return hash_parts([x.digest() for x in self._each()]).hex()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See RandomAccess."""
        return {"documents": len(self), "tokens": self.tokens, "digest": self.content_key}

    def _find(self, firsts: np.ndarray, index: int) -> tuple[Part, int]:
        if not 0 <= index < firsts[-1]:
            raise IndexError(f"{self._parts[0].name}: no number {index} among {firsts[-1]}")
        if len(self._parts) == 1:
            return self._parts[0], index
        i = int(np.searchsorted(firsts, index, side="right")) - 1
        return self._use(i), index - int(firsts[i])

    def _each(self) -> Iterator[Part]:
        return map(self._use, range(len(self._parts)))

    def _use(self, i: int) -> Part:
        """Part i. One that was not used for long gives back its descriptors: there may be thousands of files."""
        known = i in self._used
        self._used.pop(i, None)
        self._used[i] = None
        if not known and len(self._used) > _most_open():
            oldest = next(iter(self._used))
            self._used.pop(oldest, None)
            self._parts[oldest].close()
        return self._parts[i]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ARRAYS}


def _most_open() -> int:
    """Parts that may be open at once: with two files each, half of what the process may open, so `ulimit -n` helps."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


def _read(part: Part, start: int, stop: int, offset: int, count: int | None) -> np.ndarray:
    first = min(start + offset, stop)
    return part.read(first, stop if count is None else min(first + count, stop))


def open_tokens(path: str, marks: Marks | None = None) -> TokenFiles:
    """The documents of the token files that a path names: one prefix or file, or all of a folder or a glob, sorted.

    `marks` say where documents begin or end in files without an index; None: each of those is one document.
    Raises DataError that says what is wrong with the files, and how to mend it.
    """
    marks = marks or Marks()
    return TokenFiles([IndexedPart(x.name) if x.indexed else ShardPart(x.name, marks) for x in find_tokens(path)])
