"""From a record to tokens, and to which of them a loss is taken at: the contract, and the two plainest encoders.

Sources know files, encoders know meanings; so chats may come from Parquet and text from a URL. An encoder sees one
record at a time and draws, if at all, by the place of the record in the job's order: what a document becomes is a fact
of the config, whoever reads it and however often.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from components.data.documents import MEND, BadRecord, Record
from components.data.origins import Origin
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")
Where = Callable[[], str]
"""`file:line` of a record, asked only when it is needed for a message."""


class Encoded(NamedTuple):
    """A document as the packer takes it, begin and end tokens included."""

    tokens: np.ndarray
    """# (tokens,) int64"""
    targets: np.ndarray | None
    """Which of them a loss is taken at when they are predicted; None: all. # (tokens,) bool"""
    origin: Origin | None = None
    """Where they come from, while somebody listens (components/data/origins.py)."""


class Seat(NamedTuple):
    """Where a document stands in the job's order: what its random numbers are keyed by."""

    epoch: int
    position: int
    """In the epoch's order."""


class Encoder(Protocol):
    """Makes tokens of records. Must survive pickling or a fork, since loader workers get a copy."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens a record becomes, as JSON values."""
        ...

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """Tokens of a record. Raises BadRecord, whose message begins with `where()`."""
        ...


class TextEncoder:
    """Plain text between begin and end tokens, where the tokenizer has them and they are wanted."""

    def __init__(self, tokenizer: Tokenizer, field: str, *, add_bos: bool, add_eos: bool) -> None:
        self._tokenizer, self._field = tokenizer, field
        self._bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self._eos = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
        self.fingerprint: dict[str, Any] = {
            "text_field": field,
            "tokenizer": tokenizer.fingerprint,
            "begin_token": tokenizer.bos_id if add_bos else None,
            "end_token": tokenizer.eos_id if add_eos else None,
        }

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """See Encoder."""
        ids = encode_text(self._tokenizer, text_in(record, self._field, where), where)
        return Encoded(np.array([*self._bos, *ids, *self._eos], np.int64), None)


class TokensEncoder:
    """Token ids as they are. Raises BadRecord for one that the model's vocabulary has not."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        self.fingerprint: dict[str, Any] = {}

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """See Encoder."""
        if not isinstance(record, np.ndarray):
            raise BadRecord(f"{where()}: a record must be token ids, not {type(record).__name__}; {MEND}")
        if len(record) and not 0 <= int(record.min()) <= int(record.max()) < self._vocab:
            found = f"{int(record.min())} to {int(record.max())}"
            raise BadRecord(
                f"{where()}: token ids from {found}, but the model's vocabulary has {self._vocab};"
                " take the tokenizer that the files were made with, and a flavor whose vocabulary holds it"
            )
        return Encoded(record.astype(np.int64, copy=False), None)


def text_in(record: Record, field: str, where: Where) -> str:
    """Text of a record: itself, or its field. Raises BadRecord if there is none, or if it is no text."""
    if isinstance(record, Mapping):
        return field_of(record, field, where)
    if isinstance(record, str):
        return whole_text(record, "the document", where)
    raise BadRecord(f"{where()}: a record must be text, not token ids; set the source's kind to tokens")


def field_of(record: Mapping[str, Any], field: str, where: Where) -> str:
    """A field that must hold text. Raises BadRecord."""
    if field not in record:
        there = ", ".join(repr(x) for x in record) or "none"
        raise _bad(where, f"no field {field!r} (fields: {there}; data.text_field names the field to read)")
    if not isinstance(record[field], str):
        kind = "null" if record[field] is None else type(record[field]).__name__
        raise _bad(where, f"field {field!r} is {kind}, not text")
    return whole_text(record[field], f"field {field!r}", where)


def whole_text(text: str, what: str, where: Where) -> str:
    """The text, if it is made of characters. Raises BadRecord."""
    if not text.isascii() and SURROGATE.search(text):
        raise _bad(where, f"{what} holds half of a surrogate pair, which is no character")
    return text


def encode_text(tokenizer: Tokenizer, text: str, where: Where) -> list[int]:
    """Ids of a text. Raises BadRecord where the tokenizer fails."""
    try:
        return tokenizer.encode(text)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception, and a tokenizer of the user's whatever it likes
        what = f"the tokenizer fails on this document ({type(error).__name__}: {error})"
        raise BadRecord(f"{where()}: {what}; {MEND}") from error


def _bad(where: Where, what: str) -> BadRecord:
    return BadRecord(f"{where()}:1: {what}; {MEND}")
