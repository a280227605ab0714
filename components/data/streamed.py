"""Streamed rows: each stream encodes its own documents as they come, mixes the sources by quota and packs what it gets.

A cursor is (k, and for each source: epoch, position of its next document that has not been taken, tokens or documents
taken, phase), where k says how much is done of what is being packed (components/data/packing.py). A resume encodes
those documents again; no token is ever saved, and the position of no stream depends on another's.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from typing import Any, Literal

from components.data.documents import MEND, BadRecord, Record
from components.data.encoding import Encoded, Seat
from components.data.mixture import WIDTH, Feed, Mixture, StreamSource, called, phases
from components.data.order import Document, Place, Walk
from components.data.origins import Listener, Origin
from components.data.packing import Dropped, Packing, prepared, rows_of
from components.data.quota import PER_DOCUMENT, whole_weights
from components.data.rows import Counts, Cursor, Ending, Row
from components.runtime.errors import DataError, EspalierError

SAMPLE = 16  # documents that a source's mean length is estimated from


class StreamedRows:
    """RowSource over documents. `skip_bad`: pass over records that cannot be read, and count them.

    `unit` is what weights are shares of. Sources' deals have the same number of streams.
    """

    kind = "streamed"

    def __init__(
        self,
        sources: Sequence[StreamSource],
        packing: Packing,
        *,
        unit: Literal["tokens", "documents"] = "tokens",
        ending: Ending,
        skip_bad: bool,
        fingerprint: dict[str, Any],
    ) -> None:
        self._sources, self._packing, self._skip_bad = sources, packing, skip_bad
        self._weights, self._per_document = whole_weights([x.weight for x in sources]), unit == "documents"
        self._begun: list[Cursor] = []
        self._usable: set[str] = set()  # sources of which some document is known to be packed
        self.listener: Listener | None = None
        self.ending: Ending = ending
        self.seq_len, self.streams = packing.seq_len, sources[0].deal.streams
        self.counts = Counts(skipped={x.name: 0 for x in sources})
        self.fingerprint = fingerprint

    @property
    def ends(self) -> bool:
        """Whether all sources have a last epoch."""
        return all(x.deal.epochs is not None for x in self._sources)

    def start(self) -> list[Cursor]:
        """Stream s begins with document s of each source, at its own phase of the mixture. Raises DataError."""
        if not self._begun:
            several = len(self._sources) > 1 and self.streams > 1
            lengths = [self._mean(x) if several else 0 for x in self._sources]
            self._begun = [
                (0, *chain.from_iterable((0, s, 0, phase) for phase in phases(lengths, s))) for s in range(self.streams)
            ]
        return self._begun

    def resume(self, table: Sequence[Sequence[int]]) -> list[Cursor]:
        """The table as it is. Raises DataError if its size does not fit."""
        if len(table) != self.streams:
            raise DataError(
                f"the saved loader state has {len(table)} streams, this job {self.streams}; set data.streams to that"
            )
        width = 1 + WIDTH * len(self._sources)
        if any(len(x) != width for x in table):
            raise DataError(
                f"the saved loader state has cursors of {len(table[0])} numbers, this job of {width}, as many as its"
                " sources ask for; give the sources that the state was saved with"
            )
        return [tuple(int(x) for x in cursor) for cursor in table]

    def mixture(self, table: Sequence[Sequence[int]]) -> dict[str, int]:
        """See Mixed. A document counts when it has been packed to its end."""
        unit = PER_DOCUMENT if self._per_document else 1
        taken = [sum(row[1 + WIDTH * d + 2] for row in table) for d in range(len(self._sources))]
        return {x.name: a // unit for x, a in zip(self._sources, taken, strict=True)}

    def open(self, cursors: Mapping[int, Cursor]) -> list[Iterator[tuple[Row, Cursor]]]:
        """See RowSource."""
        walks = [
            source.deal.open({s: Place(*c[1 + WIDTH * d :][:2]) for s, c in cursors.items()})
            for d, source in enumerate(self._sources)
        ]
        return [self._rows(c, [x[s] for x in walks]) for s, c in cursors.items()]

    def _rows(self, cursor: Cursor, walks: Sequence[Walk]) -> Iterator[tuple[Row, Cursor]]:
        """Rows of one stream, from the documents of each source."""
        feeds = [
            Feed(x.name, walk, partial(self._encoded, x), partial(self._require_any, x))
            for x, walk in zip(self._sources, walks, strict=True)
        ]
        mixture = Mixture(feeds, self._weights, self._units, cursor[1:])
        pad = self.ending == "pad"
        return rows_of(mixture, self._packing, cursor[0], self.counts, pad=pad, listener=self.listener)

    def _units(self, document: Encoded) -> int:
        return PER_DOCUMENT if self._per_document else len(document.tokens)

    def _encoded(self, source: StreamSource, document: Document) -> Encoded | None:
        """A document as it is packed; None if there is nothing to pack, which is counted. Raises DataError."""
        try:
            found = self._made(source, document)
        except BadRecord as error:
            if not (self._skip_bad or error.harmless):
                raise
            self.counts.skipped[source.name] += 1
            return None
        if isinstance(found, Encoded):
            return found
        self.counts.dropped_documents += found is Dropped.LONG
        self.counts.targetless_documents += found is Dropped.TARGETLESS
        return None

    def _made(self, source: StreamSource, document: Document) -> Encoded | Dropped:
        """A document as it is packed, or why it is not. Raises BadRecord."""
        encoded = source.encoder.encode(_read(document), document.where, Seat(document.epoch, document.position))
        if self.listener is not None:
            encoded = encoded._replace(origin=Origin(source.name, document.where(), 0, len(encoded.tokens)))
        return prepared(encoded, self._packing, document.where)

    def _require_any(self, source: StreamSource) -> None:
        """Raises DataError, which says why, if no document of a source can be packed. Reads until one can.

        Held-out documents may be all dropped: that is told of the validation set, and ends no job.
        """
        if self.ending == "pad" or source.name in self._usable:
            return
        dropped, first = Counter[Dropped | None](), ""
        walks = source.deal.open({s: Place(0, s) for s in range(self.streams)})
        for number in count():
            document = next(walks[number % self.streams], None)
            if document is None or document.epoch:
                raise _all_dropped(source.name, dropped, first, self._packing)
            try:
                found = self._made(source, document)
            except BadRecord as error:
                dropped[None] += 1
                first = first or str(error).removesuffix(f"; {MEND}")
                continue
            if isinstance(found, Encoded):
                self._usable.add(source.name)
                return
            dropped[found] += 1

    def _mean(self, source: StreamSource) -> int:
        """What a document of a source counts, in the mean over the first of its order that can be read."""
        if self._per_document:
            return PER_DOCUMENT
        walks = source.deal.open({s: Place(0, s) for s in range(min(SAMPLE, self.streams))})
        lengths: list[int] = []
        for number in range(SAMPLE):
            try:
                document = next(walks[number % len(walks)], None)
                found = None if document is None else self._made(source, document)
            except BadRecord:  # told, or skipped and counted, by the stream that it belongs to
                continue
            lengths.append(len(found.tokens) if isinstance(found, Encoded) else 0)
        return sum(lengths) // max(1, len(lengths))


def _read(document: Document) -> Record:
    """Its record. Raises BadRecord; DataError for whatever else a source of the user's own raises."""
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


def _all_dropped(name: str, dropped: Counter[Dropped | None], first: str, packing: Packing) -> DataError:
    """The error for a source that has nothing to pack. None among the reasons: a bad record, `first` says which."""
    reason, number = dropped.most_common(1)[0]
    match reason:
        case Dropped.EMPTY:
            why, mend = "are empty", "give documents with text in them"
        case Dropped.LONG:
            why = f'are longer than a row of {packing.seq_len} tokens (data.long_documents = "drop")'
            mend = "raise training.seq_len, or have such documents cut by another data.long_documents"
        case Dropped.TARGETLESS:
            why = "have no token that a loss is taken at, or none that truncating leaves"
            mend = "raise training.seq_len, or set data.long_documents to truncate_left or split"
        case _:
            why, mend = f"cannot be read (the first: {first})", "mend them, or give other documents"
    total = sum(dropped.values())
    return DataError(
        f"{called(name)}: all its {total} documents were dropped, {number} of them since they {why}; {mend}"
    )
