"""What both orders of token files need of them: lengths without reading, parts of documents, a key to the content."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from components.data.documents import place_of
from components.data.origins import Origin
from components.runtime.errors import DataError


class Tokens(Protocol):
    """Documents that are token ids, as those of TokenFiles and TokenSlice are."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document. # (documents,) int64"""
        ...

    @property
    def content_key(self) -> str:
        """Digest of the content."""
        ...

    def read(self, index: int, offset: int = 0, count: int | None = None) -> np.ndarray:
        """`count` tokens of a document from `offset` on; None: to its end. Raises DataError. # (count,) int64"""
        ...


class TokenSource(NamedTuple):
    """One of the sources of a job whose rows come from token files."""

    name: str
    """Each name once; "" for a job's only source."""
    files: Tokens
    weight: float = 1.0
    """Share in the mixture."""
    epochs: int | None = None
    """Passes after which it leaves the mixture (native order only); None: the ending decides."""


class Piece(NamedTuple):
    """What a row takes of one document."""

    source: TokenSource
    document: int
    offset: int
    count: int


def origins_of(pieces: Sequence[Piece]) -> list[Origin]:
    """Where pieces come from."""
    return [
        Origin(x.source.name, place_of(x.source.files, x.document), x.offset, int(x.source.files.lengths[x.document]))
        for x in pieces
        if x.count
    ]


def join(pieces: Sequence[Piece], vocab_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the pieces, and the piece that each belongs to. # both (tokens,) int64

    Raises DataError for token ids that the model's vocabulary has not (None: any will do).
    """
    pieces = [x for x in pieces if x.count]
    parts = [x.source.files.read(x.document, x.offset, x.count) for x in pieces]
    tokens = np.concatenate(parts)
    if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        bad, ids = next((x, y) for x, y in zip(pieces, parts, strict=True) if y.min() < 0 or y.max() >= vocab_size)
        raise DataError(
            f"source {bad.source.name!r}, document {bad.document}, counted from 0: token ids from {ids.min()} to"
            f" {ids.max()}, but the model's vocabulary has {vocab_size}; take the tokenizer that the files were made"
            " with, and a flavor whose vocabulary holds it"
        )
    return tokens, np.repeat(np.arange(len(parts)), [len(x) for x in parts])
