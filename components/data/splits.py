"""Parts of a source: consecutive documents of it, such as the share that training reads (`shares.py`)."""

from typing import Any

import numpy as np

from components.data.documents import RandomAccess, Record, check_unchanged, place_of
from components.data.shares import NAMES, share_bounds
from components.data.token_files import TokenFiles
from components.runtime.errors import ConfigError


class Slice:
    """RandomAccess over consecutive documents of another."""

    def __init__(self, source: RandomAccess, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the whole, and which documents."""
        return self._source.fingerprint | {"slice": [self._start, self._stop]}

    def document(self, index: int) -> Record:
        """See RandomAccess."""
        return self._source.document(self._at(index))

    def place(self, index: int) -> str:
        """Where the document stands in the whole."""
        return place_of(self._source, self._at(index))

    def check(self) -> None:
        """See Watched."""
        check_unchanged(self._source)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"no document {index} among {len(self)}")
        return self._start + index


class TokenSlice(Slice):
    """The same of token files, with lengths and parts of documents, so that rows can be indexed.

    With `sequences` its documents are the files' sequences, Megatron-LM's unit of GPT data.
    """

    def __init__(self, source: TokenFiles, start: int, stop: int, *, sequences: bool = False) -> None:
        super().__init__(source, start, stop)
        self._tokens, self._unit = source, "sequences" if sequences else "documents"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document. # (documents,) int64"""
        whole = self._tokens.sequence_lengths if self._unit == "sequences" else self._tokens.lengths
        return whole[self._start : self._stop]

    @property
    def content_key(self) -> str:
        """That of the whole, and which part of it."""
        return f"{self._tokens.content_key} {self._unit} {self._start}:{self._stop}"

    def document(self, index: int) -> np.ndarray:
        """See RandomAccess."""
        return self.read(index)

    def read(self, index: int, offset: int = 0, count: int | None = None) -> np.ndarray:
        """See TokenFiles."""
        read = self._tokens.read_sequence if self._unit == "sequences" else self._tokens.read
        return read(self._at(index), offset, count)

    def place(self, index: int) -> str:
        """See Placed."""
        place = self._tokens.sequence_place if self._unit == "sequences" else self._tokens.place
        return place(self._at(index))


def take_share(source: RandomAccess, split: str, part: int, key: str) -> Slice:
    """Part 0 (training), 1 (validation) or 2 (test) of a source's documents.

    Raises ConfigError naming the key: shares that are none, or a part without a document.
    """
    return Slice(source, *_bounds(split, part, len(source), "documents", key))


def take_tokens(
    files: TokenFiles, split: str | None, part: int, key: str, *, sequences: bool
) -> TokenFiles | TokenSlice:
    """The same of token files, None being all of them. With `sequences` these are counted, and are its documents.

    Raises ConfigError as above.
    """
    count, what = (files.sequences, "sequences") if sequences else (len(files), "documents")
    if split is not None:
        return TokenSlice(files, *_bounds(split, part, count, what, key), sequences=sequences)
    return TokenSlice(files, 0, count, sequences=True) if sequences else files


def _bounds(split: str, part: int, count: int, what: str, key: str) -> tuple[int, int]:
    start, stop = share_bounds(split, part, count, key)
    if start == stop:
        raise ConfigError(f"{key} = {split!r}: {NAMES[part]} gets none of {count} {what}; give it a larger share")
    return start, stop
