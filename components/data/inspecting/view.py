"""One row taken apart: its documents, which of its tokens a loss is taken at, and what each token says.

Everything comes from the batch itself, so that what is shown is what is trained on; only where a document comes from is
asked of the row source. That has a price: where the source does not say, padding is known by what it looks like (the
row's last document, all zeros, without a label), and of a document that a row cuts only the piece in the row is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from components.data.origins import Origin
from components.data.tokenizer import Tokenizer
from components.mesh.batch import IGNORE, Batch

UNFINISHED = "\ufffd"
"""What a decoder gives for bytes that are no character, or not one yet."""
LONGEST = 8
"""Tokens after which bytes are no longer waited for to become a character."""


@dataclass(frozen=True)
class Piece:
    """What a row holds of one document."""

    start: int
    """Its first token's place in the row."""
    stop: int
    """The place after its last token."""
    padding: bool
    """Nothing but filling."""
    origin: Origin | None
    """Where it comes from; None: the row source does not say."""

    def __len__(self) -> int:
        return self.stop - self.start

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        own = {} if self.origin is None else self.origin._asdict()
        return {"start": self.start, "stop": self.stop, "padding": self.padding, **own}


@dataclass(frozen=True)
class RowView:
    """One row of a batch. # arrays (seq,) int64"""

    step: int
    """Counted from 1, as in training."""
    row: int
    """In the global batch, counted from 0; so too the stream that it comes from."""
    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    pieces: tuple[Piece, ...]

    @property
    def trained(self) -> int:
        """Places at which a loss is taken."""
        return int((self.labels != IGNORE).sum())

    @property
    def padding(self) -> int:
        """Places that nothing fills."""
        return sum(len(piece) for piece in self.pieces if piece.padding)

    @property
    def documents(self) -> tuple[Piece, ...]:
        """The pieces that are of documents."""
        return tuple(piece for piece in self.pieces if not piece.padding)

    @property
    def targets(self) -> np.ndarray:
        """Which tokens of the row are predicted, with a loss, from the token before them. # (seq,) bool"""
        predicted = (self.labels[:-1] != IGNORE) & (self.labels[:-1] == self.tokens[1:])
        return np.concatenate([[False], predicted])

    @property
    def further(self) -> dict[int, int]:
        """Labels that are not the row's next token: place → token. At the row's end above all, which may lie within a
        document, and where a document ends that has one more token."""
        following = np.append(self.tokens[1:], IGNORE)
        places = np.flatnonzero((self.labels != IGNORE) & (self.labels != following))
        return {int(place): int(self.labels[place]) for place in places}

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("tokens", "labels", "positions")}
        documents = [piece.plain() for piece in self.pieces]
        return {"step": self.step, "row": self.row, **arrays, "documents": documents}


def views(batch: Batch, step: int, origins: Sequence[Sequence[Origin] | None] | None = None) -> Iterator[RowView]:
    """The rows of a whole global batch. `origins`: of each row, those of its documents in order, where known."""
    for row in range(batch.rows):
        tokens, labels, positions, ids = (
            x[row].numpy() for x in (batch.tokens, batch.labels, batch.positions, batch.document_ids)
        )
        pieces = _pieces(tokens, labels, ids, None if origins is None else origins[row])
        yield RowView(step, row, tokens, labels, positions, pieces)


def _pieces(
    tokens: np.ndarray, labels: np.ndarray, ids: np.ndarray, origins: Sequence[Origin] | None
) -> tuple[Piece, ...]:
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    spans, start = list(pairwise(borders)), borders[-2]
    filled = not tokens[start:].any() and bool((labels[start:] == IGNORE).all())
    if origins is not None:
        filled = len(origins) < len(spans)
    return tuple(
        Piece(start, stop, padding, None if origins is None or padding else origins[i])
        for i, (start, stop) in enumerate(spans)
        for padding in (filled and i == len(spans) - 1,)
    )


def texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it.

    A character whose bytes several tokens share belongs to the last of them. Ids that the tokenizer has not are shown
    by their numbers.
    """
    found: list[str] = []
    before: list[int] = []  # tokens whose text is told, as many as may decide how the next begins
    held: list[int] = []
    for token in (int(x) for x in ids):
        if not 0 <= token < tokenizer.vocab_size:
            found.append(_rest(tokenizer, before, held) + f"⟨{token}⟩")
            before, held = [], []
            continue
        held.append(token)
        text = _rest(tokenizer, before, held)
        if text.endswith(UNFINISHED) and len(held) < LONGEST:
            found.append("")
        else:
            found.append(text)
            before, held = held, []
    if held:
        found[-1] = _rest(tokenizer, before, held)
    return found


def _rest(tokenizer: Tokenizer, before: list[int], held: list[int]) -> str:
    """Text of the tokens held, as it is after those before. Decoders treat a text's first token in their own ways."""
    told = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *held])
    return whole[len(told) :] if whole.startswith(told) else tokenizer.decode(held)
