"""Preference pairs, read in the order of their files: no rows are made of them, so there is nothing else to show."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from components.config.data import Source
from components.data.chat.template import load_chat_template
from components.data.documents import RandomAccess, Read, place_of
from components.data.encoding import Encoded, Where
from components.data.indexed import RowIndex
from components.data.inspecting.view import Piece, RowView
from components.data.names import name_of
from components.data.opening import Opener
from components.data.origins import Origin
from components.data.preference import PreferenceEncoder
from components.data.shares import is_shares
from components.mesh.batch import IGNORE
from components.runtime.errors import ConfigError


@dataclass(frozen=True)
class PairView:
    """Two answers, each behind the prompt; as rows, though none are made of them."""

    source: str
    where: str
    chosen: RowView
    rejected: RowView

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        sides = {"chosen": self.chosen.plain(), "rejected": self.rejected.plain()}
        return {"source": self.source, "where": self.where, **sides}


def pairs_of(opener: Opener, source: Source) -> Iterator[PairView]:
    """The pairs of a source. Raises ConfigError, DataError; BadRecord for a record that is no pair."""
    name = name_of(source)
    tokenizer = opener.fitting_tokenizer(name)
    template = load_chat_template(opener.assets, source.chat_template)
    encoder = PreferenceEncoder(tokenizer, template, add_bos=opener.job.data.add_bos)
    for number, (read, where) in enumerate(_records(opener, source)):
        pair = encoder.encode_pair(read(), where)
        sides = (_as_row(x, number, Origin(name, where(), 0, len(x.tokens))) for x in pair)
        yield PairView(name, where(), *sides)


def _records(opener: Opener, source: Source) -> Iterator[tuple[Read, Where]]:
    documents = opener.documents(source)
    if isinstance(documents, RowIndex):
        raise ConfigError(f"source {name_of(source)!r}: its dataset makes rows, not pairs")
    if source.split is not None and is_shares(source.split):
        documents = opener.share(documents, source.split, name_of(source))
    if isinstance(documents, RandomAccess):
        for index in range(len(documents)):
            yield partial(documents.document, index), partial(place_of, documents, index)
        return
    for index, read in enumerate(documents.records(0)):
        yield read, partial(place_of, read, index)


def _as_row(answer: Encoded, number: int, origin: Origin) -> RowView:
    tokens, targets = answer.tokens, answer.targets
    labels = np.append(tokens[1:], IGNORE)
    if targets is not None:
        labels[:-1][~targets[1:]] = IGNORE
    return RowView(0, number, tokens, labels, np.arange(len(tokens)), (Piece(0, len(tokens), False, origin),))
