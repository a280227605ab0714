"""Streamed rows: each stream tokenizes its own documents as they come and packs them by concatenating and splitting.

Consecutive rows of a stream share one token (the last label of one is the first input of the next), so that each token
is predicted exactly once. A cursor is (epoch, position of the document in it, token offset in the document) of the next
row's first token, offsets counted over begin token, text and end token: a resume tokenizes that document again, and no
token is ever saved. Packing whole documents by best fit was rejected: a cursor would then be a buffer.
"""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.data.documents import MEND, BadRecord
from components.data.order import Deal, Document, Place
from components.data.rows import Cursor, Ending, Row, make_row
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError, EspalierError

BARREN_EPOCHS = 16


@dataclass(frozen=True)
class Packing:
    """How documents become rows."""

    seq_len: int
    """Tokens in a row."""
    add_bos: bool
    """Begin token before each document, where the tokenizer has one."""
    add_eos: bool
    """End token after each document, likewise."""
    document_mask: bool
    """Rows mark the borders of documents."""


@dataclass
class _Piece:
    """The tokens of a document that no row has taken yet."""

    epoch: int
    position: int
    offset: int
    tokens: np.ndarray  # (tokens,) int64, from `offset` on


class StreamedRows:
    """RowSource over documents. `skip_bad`: pass over records that cannot be read, and count them in `skipped`."""

    kind = "streamed"

    def __init__(
        self,
        deal: Deal,
        tokenizer: Tokenizer,
        packing: Packing,
        *,
        ending: Ending,
        skip_bad: bool,
        fingerprint: dict[str, Any],
    ) -> None:
        self._deal, self._tokenizer, self._packing, self._skip_bad = deal, tokenizer, packing, skip_bad
        self._bos = [tokenizer.bos_id] if packing.add_bos and tokenizer.bos_id is not None else []
        self._eos = [tokenizer.eos_id] if packing.add_eos and tokenizer.eos_id is not None else []
        self.ending: Ending = ending
        self.seq_len, self.streams, self.skipped = packing.seq_len, deal.streams, 0
        self.fingerprint = fingerprint

    def start(self) -> list[Cursor]:
        """Stream s begins with document s."""
        return [(0, s, 0) for s in range(self.streams)]

    def resume(self, table: Sequence[Sequence[int]]) -> list[Cursor]:
        """The table as it is. Raises DataError if its size does not fit."""
        if len(table) != self.streams or any(len(x) != 3 for x in table):
            raise DataError(
                f"the saved loader state has {len(table)} streams, this job {self.streams}; set data.streams to that"
            )
        return [tuple(int(x) for x in cursor) for cursor in table]

    def open(self, cursors: Mapping[int, Cursor]) -> list[Iterator[tuple[Row, Cursor]]]:
        """See RowSource."""
        documents = self._deal.open({s: Place(c[0], c[1]) for s, c in cursors.items()})
        return [self._rows(documents[s], c[0], c[2]) for s, c in cursors.items()]

    def _rows(self, documents: Iterator[Document], epoch: int, offset: int) -> Iterator[tuple[Row, Cursor]]:
        """Rows of one stream; `offset` tokens of its first document are done."""
        held: deque[_Piece] = deque()  # starts with the next row's first token
        count = 0
        for document in documents:
            tokens = self._tokens(document)[offset:]
            if len(tokens):
                held.append(_Piece(document.epoch, document.position, offset, tokens))
                count, epoch, offset = count + len(tokens), document.epoch, 0
            elif document.epoch > epoch + BARREN_EPOCHS:
                raise DataError(
                    f"a stream found no text in {BARREN_EPOCHS} epochs; give more documents, or set data.streams lower"
                )
            while count > self.seq_len:
                row = self._row(held)
                count -= self.seq_len
                yield row, _drop(held, self.seq_len)
        if self.ending == "pad" and count > 1:
            row = self._row(held)
            yield row, _drop(held, count - 1)

    def _tokens(self, document: Document) -> np.ndarray:
        """Tokens of a document with its begin and end; none if it cannot be read. # (tokens,) int64"""
        try:
            ids = self._encode(_read(document), document.where)
        except BadRecord as error:
            if not (self._skip_bad or error.harmless):
                raise
            self.skipped += 1
            return np.empty(0, np.int64)
        return np.array([*self._bos, *ids, *self._eos], np.int64)

    def _encode(self, text: str, where: Callable[[], str]) -> list[int]:
        """Ids of a text. Raises BadRecord where the tokenizer fails."""
        try:
            return self._tokenizer.encode(text)
        except Exception as error:  # the library raises bare Exception, and a tokenizer of the user's whatever it likes
            what = f"the tokenizer fails on this document ({type(error).__name__}: {error})"
            raise BadRecord(f"{where()}: {what}; {MEND}") from error

    def _row(self, held: deque[_Piece]) -> Row:
        """The next row, from up to seq + 1 of the tokens held."""
        taken, missing = [], self.seq_len + 1
        for piece in held:
            taken.append(piece.tokens[:missing])
            missing -= len(taken[-1])
            if not missing:
                break
        ids = np.repeat(np.arange(len(taken)), [len(x) for x in taken])
        return make_row(np.concatenate(taken), ids, self.seq_len, self._packing.document_mask)


def _read(document: Document) -> str:
    """Its text. Raises BadRecord; DataError for whatever else a source of the user's own raises."""
    try:
        return document.read()
    except EspalierError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{document.where()}: reading this document fails with {type(error).__name__}: {error}"
            f" ({at.filename}:{at.lineno}); mend the dataset's code"
        ) from error


def _drop(held: deque[_Piece], count: int) -> Cursor:
    """Drop the first `count` tokens, fewer than are held; return the cursor of the one after them."""
    while count >= len(held[0].tokens):
        count -= len(held.popleft().tokens)
    first = held[0]
    first.tokens, first.offset = first.tokens[count:], first.offset + count
    return first.epoch, first.position, first.offset
