"""Token files in memory and on disk, for the tests of their orders."""

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from components.data.index_cache import IndexCache
from components.data.token_rows import TokenSource
from components.data.token_writer import IndexedWriter

Documents = Sequence[Sequence[int]]


class MemoryTokens:
    """Tokens in lists."""

    def __init__(self, documents: Documents) -> None:
        self._documents = [np.array(x, np.int64) for x in documents]
        self.lengths = np.array([len(x) for x in documents], np.int64)
        self.content_key = sha256(repr([list(x) for x in documents]).encode()).hexdigest()

    def read(self, index: int, offset: int = 0, count: int | None = None) -> np.ndarray:
        return self._documents[index][offset : None if count is None else offset + count]


def numbered(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents of these lengths; every token is another number, so that it tells where it stood."""
    ends = np.cumsum([first, *lengths]).tolist()
    return [list(range(a, b)) for a, b in pairwise(ends)]


def source(
    name: str,
    documents: Documents | Sequence[int],
    weight: float = 1.0,
    epochs: int | None = None,
    first: int = 0,
) -> TokenSource:
    """A source in memory of documents, or of numbered ones of these lengths."""
    whole = [x if isinstance(x, Sequence) else [] for x in documents]
    lengths = [x for x in documents if isinstance(x, int)]
    return TokenSource(name, MemoryTokens(numbered(lengths, first) if lengths else whole), weight, epochs)


def write_tokens(prefix: Path, documents: Documents) -> Path:
    """A pair of files."""
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for x in documents:
            writer.add_document(np.array(x, np.int64))
    return prefix


class NoCache(IndexCache):
    """Builds always."""

    def __init__(self) -> None:
        super().__init__("/dev/null/none")
