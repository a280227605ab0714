"""Rows in the project's own order: the whole job is one stream of tokens, and row n is tokens n·L to n·L + L of it.

An index says which document stands where in the stream: 16 bytes a document, in segments of growing size that are built
for the rows a job needs, kept between jobs, and continued on demand. Each segment ends with how far the sources have
come, so that a longer job has the same beginning and a later segment needs none of the former but its end. Rejected:
one array for the whole job, which would be built anew for another number of steps; and no index at all, with positions
computed for each row, which weights do not allow.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.data.index_cache import IndexCache
from components.data.megatron_order import ceil_div
from components.data.native_order import Mixture, OwnOrder, Progress, Unit
from components.data.origins import Origin
from components.data.quota import whole_weights
from components.data.rows import Ending
from components.data.token_rows import Piece, TokenSource, join, origins_of
from components.runtime.errors import DataError

SMALLEST, LARGEST = 1 << 10, 1 << 22  # documents in a segment; each has twice as many as the one before


class NativeRows:
    """RowIndex over token files, mixed by quotas.

    Args:
        sources: With weights. A source without a number of epochs ends after one, but never if the ending is `repeat`.
        seq_len: Tokens in a row, L.
        rows: For how many the index is built at once; those beyond cost time when they are asked for.
        seed: Draws each source's order in each epoch; None: in the order of the files.
        ending: `pad`: the last row may be short. Else there are only whole ones, of L + 1 tokens.
        unit: What weights are shares of.
        cache: Where the index is kept.
        vocab_size: Of the model; None: token ids are not checked.

    Raises DataError for a source without tokens, and if there is not one row.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        seq_len: int,
        rows: int,
        seed: int | None,
        ending: Ending,
        unit: Unit = "tokens",
        cache: IndexCache,
        vocab_size: int | None = None,
    ) -> None:
        self._sources, self._seed, self._unit, self._cache = list(sources), seed, unit, cache
        self._epochs = [1 if x.epochs is None and ending != "repeat" else x.epochs for x in sources]
        self._bases = np.cumsum([0, *(len(x.files.lengths) for x in sources)]).tolist()
        self._tokens = self._whole()
        self._vocab, self.seq_len = vocab_size, seq_len
        self.count: int | None = self._count(ending)
        if self.count == 0:
            raise self._too_short(ending)
        self._segments: list[Mapping[str, np.ndarray]] = []
        self._ends: list[int] = []
        self._mixture: Mixture | None = None
        self._reach(rows * seq_len + 1)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See RowIndex. Not how the data end, which changes no row that is there both ways."""
        parts = {
            x.name: {"content": x.files.content_key, "weight": x.weight, "epochs": x.epochs} for x in self._sources
        }
        return {"order": "native", "unit": self._unit, "shuffle_seed": self._seed, "sources": parts}

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See RowIndex. Raises DataError if the files cannot be read, or hold other ids than the vocabulary."""
        return join(self._pieces_of(n), self._vocab)

    def origins(self, n: int) -> list[Origin]:
        """See TracedIndex."""
        return origins_of(self._pieces_of(n))

    def _pieces_of(self, n: int) -> list[Piece]:
        first, stop = n * self.seq_len, (n + 1) * self.seq_len + 1
        if self._tokens is not None:
            stop = min(stop, self._tokens)
        self._reach(stop)
        pieces: list[Piece] = []
        while first < stop:
            segment = bisect_right(self._ends, first)
            upto = min(stop, self._ends[segment])
            pieces += self._pieces(self._segments[segment], first, upto)
            first = upto
        return pieces

    def mixture(self, rows: int) -> dict[str, int]:
        """What weights are shares of, of each source in the first rows: tokens, or documents that begin there."""
        stop = rows * self.seq_len
        self._reach(stop)
        at = min(bisect_right(self._ends, stop), len(self._segments) - 1)
        column = 1 if self._unit == "tokens" else 0
        given = self._segments[at - 1]["progress"][:, column] if at else np.zeros(len(self._sources), np.int64)
        starts = self._segments[at]["starts"]
        begun = int(np.searchsorted(starts[:-1], stop, "left"))
        owner = np.searchsorted(self._bases, self._segments[at]["documents"][:begun], "right") - 1
        parts = np.minimum(starts[1 : begun + 1], stop) - starts[:begun]
        each = parts if self._unit == "tokens" else np.ones(begun, np.int64)
        return {x.name: int(given[d]) + int(each[owner == d].sum()) for d, x in enumerate(self._sources)}

    def _pieces(self, segment: Mapping[str, np.ndarray], first: int, stop: int) -> list[Piece]:
        """What tokens `first` to `stop` − 1 of the stream, all of one segment, are of which documents."""
        a = int(segment["starts"].searchsorted(first, "right")) - 1
        b = int(segment["starts"].searchsorted(stop, "left"))
        starts, pieces = segment["starts"][a:b].tolist(), []
        for number, start, end in zip(segment["documents"][a:b].tolist(), starts, [*starts[1:], stop], strict=True):
            source = bisect_right(self._bases, number) - 1
            begin = max(first, start)
            pieces.append(Piece(self._sources[source], number - self._bases[source], begin - start, end - begin))
        return pieces

    def _whole(self) -> int | None:
        """Tokens of all epochs; None: endless."""
        total: int | None = 0
        for source, epochs in zip(self._sources, self._epochs, strict=True):
            tokens = int(source.files.lengths.sum())
            if not tokens:
                raise DataError(f"source {source.name!r}: no tokens in its documents; give more, or another split")
            total = None if epochs is None or total is None else total + epochs * tokens
        return total

    def _count(self, ending: Ending) -> int | None:
        if self._tokens is None:
            return None
        return ceil_div(self._tokens - 1, self.seq_len) if ending == "pad" else (self._tokens - 1) // self.seq_len

    def _too_short(self, ending: Ending) -> DataError:
        names = " and ".join(repr(x.name) for x in self._sources)
        are = f"source {names} is" if len(self._sources) == 1 else f"sources {names} together are"
        needed = 2 if ending == "pad" else self.seq_len + 1
        more = "more documents" if ending == "pad" else "more documents, more epochs, or a smaller training.seq_len"
        return DataError(
            f"{are} shorter than one row of {self.seq_len} tokens: {self._tokens} in all, but with the last label at"
            f" least {needed} are needed; give {more}"
        )

    def _reach(self, tokens: int) -> None:
        """Continue the index until it holds so many tokens, or all."""
        if self._tokens is not None:
            tokens = min(tokens, self._tokens)
        while not self._ends or self._ends[-1] < tokens:
            segment = self._cache.arrays("native", self._key(len(self._segments)), self._build)
            self._segments.append(segment)
            self._ends.append(int(segment["starts"][-1]))

    def _key(self, number: int) -> dict[str, Any]:
        """All that a segment depends on: not L."""
        parts = [
            {"name": x.name, "content": x.files.content_key, "weight": weight, "epochs": epochs}
            for x, weight, epochs in zip(self._sources, self._weights(), self._epochs, strict=True)
        ]
        return {"sources": parts, "unit": self._unit, "seed": self._seed, "segment": number}

    def _build(self) -> dict[str, np.ndarray]:
        """The next segment: documents by their number over all sources, where they start, and how far this leads."""
        progress, start = [Progress(0, 0)] * len(self._sources), 0
        if self._segments:
            progress = [Progress(*x) for x in self._segments[-1]["progress"].tolist()]
            start = self._ends[-1]
        if self._mixture is None:
            self._mixture = self._mix()
        size = min(SMALLEST << len(self._segments), LARGEST)
        sources, documents = self._mixture.take(progress, size)
        numbers, lengths = documents + np.array(self._bases)[sources], np.empty(len(sources), np.int64)
        for d, source in enumerate(self._sources):
            mine = sources == d
            lengths[mine] = source.files.lengths[documents[mine]]
        starts = np.concatenate([[start], start + np.cumsum(lengths)])
        return {"documents": numbers, "starts": starts, "progress": np.array(progress, np.int64)}

    def _mix(self) -> Mixture:
        orders = [
            OwnOrder(x.files.lengths, name=x.name, seed=self._seed, epochs=epochs)
            for x, epochs in zip(self._sources, self._epochs, strict=True)
        ]
        return Mixture(orders, self._weights(), self._unit)

    def _weights(self) -> list[int]:
        return whole_weights([x.weight for x in self._sources])

    def __getstate__(self) -> dict[str, Any]:
        """Without the index: a worker that is spawned maps it from the cache."""
        return self.__dict__ | {"_segments": [], "_ends": [], "_mixture": None}
