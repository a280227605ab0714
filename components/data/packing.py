"""How the documents of one stream become rows.

`concat` cuts documents wherever a row is full: no place is left empty, and each token is predicted exactly once, since
consecutive rows share one token (the last label of one is the first input of the next). `best_fit` keeps documents
whole: it packs a window of them at a time, longest first, each into the fullest row that it still fits into (best-fit
decreasing; Ding et al., Fewer Truncations Improve Language Modeling, 2024). `padded` gives each document its own row.

A row takes seq + 1 tokens, of which the last is only a label. A cursor is a number and the state of the mixture before
the document, or window, that is being given: tokens of the document that are done (concat), rows of the window that
are (best fit), rows of the document that are (padded). A resume makes that document or window again, so no token is
saved; what it costs is a window's encoding. Carrying half-filled rows from window to window was rejected: a cursor
would then be a buffer. Instead a window ends with the last document that its rows have place for: with 32 rows 97 to
99 % of the places are filled, where documents are shorter than rows.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from components.data.documents import BadRecord
from components.data.encoding import Encoded, Where
from components.data.mixture import Mixture, Taken
from components.data.origins import Listener
from components.data.rows import Counts, Cursor, Row, make_row


@dataclass(frozen=True)
class Packing:
    """How documents become rows; the keys of `[data]`."""

    seq_len: int
    """Tokens in a row."""
    document_mask: bool = False
    """Rows mark the borders of documents."""
    cross_document_labels: bool = False
    """A document's last token predicts the next one's first."""
    kind: Literal["concat", "best_fit", "padded"] = "concat"
    """See the module."""
    window: int = 32
    """Best fit: rows that are packed together."""
    long_documents: Literal["split", "truncate", "truncate_left", "drop", "error"] = "split"
    """What happens to a document of more than seq + 1 tokens, where packing does not cut."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the meaning of a cursor and of a row depends on, as JSON values."""
        found: dict[str, Any] = {
            "seq_len": self.seq_len,
            "document_mask": self.document_mask,
            "cross_document_labels": self.cross_document_labels,
            "packing": self.kind,
        }
        if self.kind != "concat":
            found["long_documents"] = self.long_documents
        return found | ({"packing_window": self.window} if self.kind == "best_fit" else {})


class Dropped(Enum):
    """Why a readable document is not packed."""

    EMPTY = "empty"
    """It has no tokens."""
    LONG = "longer than a row"
    """And `long_documents` is `drop`."""
    TARGETLESS = "without a token that a loss is taken at"
    """Or truncating has left none."""


Rows = Iterator[tuple[Row, Cursor]]
MakeRow = Callable[[Sequence[Encoded]], Row]
"""Makes a row of documents, or of consecutive tokens of such."""


def prepared(document: Encoded, packing: Packing, where: Where) -> Encoded | Dropped:
    """The document as it is packed, or why it is not: a pure function of the document. Raises BadRecord (`fitted`).

    Parts that `split` makes are kept even where one has no target: together they are the document.
    """
    found = document if packing.kind == "concat" else fitted(document, packing, where)
    if found is None:
        return Dropped.LONG
    if not len(found.tokens):
        return Dropped.EMPTY
    first = 0 if packing.cross_document_labels else 1  # else nothing predicts a document's first token
    return found if found.targets is None or found.targets[first:].any() else Dropped.TARGETLESS


def fitted(document: Encoded, packing: Packing, where: Where) -> Encoded | None:
    """The document where packing does not cut; None if it is dropped for its length.

    Raises BadRecord if documents may not be that long.
    """
    most = packing.seq_len + 1
    if len(document.tokens) <= most or packing.long_documents == "split":
        return document
    match packing.long_documents:
        case "truncate":
            return _cut(document, slice(most))
        case "truncate_left":
            return _cut(document, slice(-most, None))
        case "drop":
            return None
    raise BadRecord(
        f"{where()}: a document of {len(document.tokens)} tokens is longer than a row, which takes {most}"
        ' (training.seq_len + 1), and data.long_documents = "error" refuses it; raise training.seq_len, set'
        " data.long_documents to split, truncate, truncate_left or drop, or leave such documents out with"
        ' data.on_bad_record = "skip"'
    )


def rows_of(
    mixture: Mixture, packing: Packing, done: int, counts: Counts, *, pad: bool, listener: Listener | None = None
) -> Rows:
    """Rows of one stream, each with the cursor after it. `done`: the cursor's number, the mixture stands at its state.

    `pad`: the last row of `concat` is given though it is not full. What the rows hold is added to `counts`.
    """

    def row(parts: Sequence[Encoded]) -> Row:
        if listener is not None:
            listener([part.origin for part in parts if part.origin is not None])
        return _row(parts, packing, counts)

    match packing.kind:
        case "concat":
            return _concat(mixture, packing.seq_len, done, row, pad)
        case "best_fit":
            return _best_fit(mixture, packing.seq_len, packing.window, done, row)
        case "padded":
            return _padded(mixture, packing.seq_len, done, row)


def _concat(mixture: Mixture, seq_len: int, done: int, row: MakeRow, pad: bool) -> Rows:
    held: deque[Taken] = deque()  # the next row begins with the first one's token number `done`
    count = -done  # tokens that no row has begun with
    while (taken := mixture.take()) is not None:
        held.append(taken)
        count += len(taken.document.tokens)
        while count > seq_len:
            made = row(_first(held, done, seq_len + 1))
            count, done = count - seq_len, _drop(held, done + seq_len)
            yield made, (done, *held[0].state)
    if pad and count > 1:
        made = row(_first(held, done, count))
        done = _drop(held, done + count - 1)
        yield made, (done, *held[0].state)


def _first(held: deque[Taken], done: int, count: int) -> list[Encoded]:
    """`count` tokens, of as many as there are at least, from number `done` on."""
    parts: list[Encoded] = []
    for taken in held:
        length = len(taken.document.tokens) - done
        parts.append(_cut(taken.document, slice(done, done + count)) if done or length > count else taken.document)
        count, done = count - length, 0
        if count <= 0:
            break
    return parts


def _drop(held: deque[Taken], count: int) -> int:
    """Drop the first `count` tokens, fewer than are held; return how many of them belong to what is now the first."""
    while count >= len(held[0].document.tokens):
        count -= len(held.popleft().document.tokens)
    return count


def _padded(mixture: Mixture, seq_len: int, done: int, row: MakeRow) -> Rows:
    while (taken := mixture.take()) is not None:
        parts = _split(taken.document, seq_len)
        for number, part in enumerate(parts[done:], done + 1):
            made = row([part])
            yield made, (number, *taken.state) if number < len(parts) else (0, *mixture.state())
        done = 0


def _best_fit(mixture: Mixture, seq_len: int, window: int, done: int, row: MakeRow) -> Rows:
    ahead: deque[list[Encoded]] = deque()  # documents of the next window that have been taken already, in parts,
    states: deque[tuple[int, ...]] = deque()  # and the mixture's state before each
    size = 0  # tokens in all of them
    while True:
        while size <= window * (seq_len + 1) and (taken := mixture.take()) is not None:
            ahead.append(_split(taken.document, seq_len))
            states.append(taken.state)
            size += _size(ahead[-1])
        if not ahead:
            return
        count, packed = _pack_window(list(ahead), seq_len + 1, window)
        state = states[0]
        for _ in range(count):
            size -= _size(ahead.popleft())
            states.popleft()
        after = states[0] if states else mixture.state()
        for number, parts in enumerate(packed[done:], done + 1):
            yield row(parts), (number, *state) if number < len(packed) else (0, *after)
        done = 0


def _pack_window(documents: Sequence[list[Encoded]], room: int, window: int) -> tuple[int, list[list[Encoded]]]:
    """How many of the documents, from the first on, fill `window` rows well, and those rows.

    As many as have place in them, or one that is longer: from what would do without waste, the last ones are left to
    the next window until the rest fits.
    """
    count = _within(documents, window * room)
    while True:
        parts = [x for i in range(count) for x in documents[i]]
        packed = best_fit([len(x.tokens) for x in parts], room)
        over = sum(len(parts[i].tokens) for x in packed[window:] for i in x)
        if count == 1 or not over:
            return count, [[parts[i] for i in sorted(x)] for x in sorted(packed, key=min)]
        while over > 0 and count > 1:
            count -= 1
            over -= _size(documents[count])


def _within(documents: Sequence[list[Encoded]], most: int) -> int:
    """How many of the documents have at most so many tokens together; at least one."""
    for count, document in enumerate(documents):
        most -= _size(document)
        if most < 0:
            return max(count, 1)
    return len(documents)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items share a row of `room`, none of them longer: best-fit decreasing, ties to what came first.

    O(n log n) but for moving entries in a list of the rows.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[item], 0))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(free, (left - lengths[item], row))
    return rows


def _split(document: Encoded, seq_len: int) -> list[Encoded]:
    """A document in parts of at most seq + 1 tokens, which share one token with the next."""
    count = max(1, -(-(len(document.tokens) - 1) // seq_len))
    return [_cut(document, slice(i * seq_len, (i + 1) * seq_len + 1)) for i in range(count)]


def _cut(document: Encoded, where: slice) -> Encoded:
    origin = document.origin and document.origin.later(where.indices(len(document.tokens))[0])
    return Encoded(document.tokens[where], None if document.targets is None else document.targets[where], origin)


def _size(parts: Sequence[Encoded]) -> int:
    return sum(len(x.tokens) for x in parts)


def _row(parts: Sequence[Encoded], packing: Packing, counts: Counts) -> Row:
    """A row, counted."""
    lengths = [len(x.tokens) for x in parts]
    counts.row_tokens += packing.seq_len
    counts.padding_tokens += max(0, packing.seq_len - sum(lengths))
    return make_row(
        np.concatenate([x.tokens for x in parts]),
        np.repeat(np.arange(len(parts)), lengths),
        packing.seq_len,
        document_mask=packing.document_mask,
        cross_document_labels=packing.cross_document_labels,
        targets=_targets(parts),
    )


def _targets(parts: Sequence[Encoded]) -> np.ndarray | None:
    """At which tokens a loss is taken; None: all. # (tokens,) bool"""
    targets = [x.targets for x in parts]
    if not any(x is not None for x in targets):
        return None
    return np.concatenate([np.ones(len(x.tokens), bool) if x.targets is None else x.targets for x in parts])
