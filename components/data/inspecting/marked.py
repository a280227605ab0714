"""Text with marks, before it is known whether it goes to a terminal, to a file or to a page.

What documents say is made harmless here, once: characters that a terminal obeys, or that turn the reading direction,
are shown by their numbers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from components.data.inspecting.view import Piece, RowView, texts
from components.data.tokenizer import Tokenizer

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but for tab and newline; line and paragraph separators; marks of direction."""


class Mark(NamedTuple):
    """What one token says."""

    text: str
    place: int
    """In the row."""
    target: bool
    """A loss is taken at its prediction."""
    special: bool
    """A token of its own, such as one that ends a document, rather than text."""
    label: bool = False
    """Not in the row: only predicted, from the token at `place`."""


def harmless(text: str) -> str:
    """The text with what a terminal would obey shown as `\\x1b`."""
    return OBEYED.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\u0100" else _long(match[0]), text)


def _long(character: str) -> str:
    return f"\\u{ord(character):04x}"


def marks(view: RowView, piece: Piece, tokenizer: Tokenizer) -> list[Mark]:
    """The tokens of a piece, each followed by the label that it predicts where that is not the row's next token."""
    ids = view.tokens[piece.start : piece.stop].tolist()
    return list(_marks(view, piece, ids, texts(tokenizer, ids), tokenizer))


def _marks(
    view: RowView, piece: Piece, ids: Sequence[int], said: Sequence[str], tokenizer: Tokenizer
) -> Iterator[Mark]:
    targets, further = view.targets, view.further
    for offset, (token, text) in enumerate(zip(ids, said, strict=True)):
        place = piece.start + offset
        yield Mark(harmless(text), place, bool(targets[place]), token in tokenizer.special_ids)
        if place in further:
            label = further[place]
            after = texts(tokenizer, [*ids[max(0, offset - 3) : offset + 1], label])[-1]
            yield Mark(harmless(after), place, True, label in tokenizer.special_ids, label=True)


def title(view: RowView) -> str:
    """What a row is."""
    return (
        f"step {view.step}, row {view.row}: {_count(len(view.tokens), 'place')},"
        f" {_count(len(view.documents), 'document')}, {view.trained:,} trained, {view.padding:,} padding"
    )


def heading(piece: Piece, number: int) -> str:
    """What a piece is, as the row's document `number`."""
    if piece.padding:
        return f"padding: {_count(len(piece), 'place')}"
    count, origin = _count(len(piece), "token"), piece.origin
    if origin is None:
        return f"document {number}: {count}"
    if len(piece) == origin.length:
        part = f"{count}, all of it"
    else:
        part = f"tokens {origin.offset:,} to {origin.offset + len(piece) - 1:,} of {origin.length:,}"
    return harmless(f"document {number}: {origin.source}, {origin.where}: {part}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
