"""Rows in Megatron-LM's order: row n is sample n of its blended dataset, so rows t·B to (t+1)·B are its global batch t.

As in Megatron-LM the number of samples has a say in the order: it decides how many epochs are shuffled together, and
whether the last is by itself. The fingerprint holds these rather than the number, so that a job can be made longer as
long as they stay. The loss at a document's last token is not decided here (`data.cross_document_labels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.data.index_cache import IndexCache
from components.data.megatron_order import Blend, Epochs, Indices, blend, epochs_of, source_indices, source_sizes
from components.data.origins import Origin
from components.data.token_rows import Piece, TokenSource, join, origins_of
from components.runtime.errors import ConfigError, DataError

SEEDS = 1 << 32


@dataclass(frozen=True)
class _Arrays:
    """What is read from the cache: everything that a row is looked up in."""

    parts: list[Indices]
    blend: Blend | None
    """None for a single source."""


class MegatronRows:
    """RowIndex of Megatron-LM's GPT data.

    Args:
        sources: What is blended, of which `files` are sequences. A single source is not blended, as in Megatron-LM
            where it has no weight.
        seq_len: Tokens in a row.
        samples: Rows that the job needs.
        seed: As Megatron-LM's `--seed`.
        cache: Where the arrays are kept.
        vocab_size: Of the model; None: token ids are not checked.

    Raises ConfigError for a seed that numpy's RandomState refuses, and DataError for sources without tokens.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        seq_len: int,
        samples: int,
        seed: int,
        cache: IndexCache,
        vocab_size: int | None = None,
    ) -> None:
        if not 0 <= seed < SEEDS:
            raise ConfigError(f"debug.seed = {seed}: Megatron-LM's order takes a seed from 0 to {SEEDS - 1}")
        self._sources, self._samples, self._seed, self._cache = list(sources), samples, seed, cache
        self._vocab, self.seq_len = vocab_size, seq_len
        self._epochs = self._plan()
        self._arrays: _Arrays | None = None
        self.count: int | None = samples
        self._opened()  # what cannot be had is told now

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See RowIndex."""
        parts = {
            source.name: {"content": source.files.content_key, "weight": source.weight, **epochs._asdict()}
            for source, epochs in zip(self._sources, self._epochs, strict=True)
        }
        return {"order": "megatron", "shuffle_seed": self._seed, "sources": parts}

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See RowIndex. Raises DataError if the files cannot be read, or hold other ids than the vocabulary."""
        return join(self._pieces_of(n), self._vocab)

    def origins(self, n: int) -> list[Origin]:
        """See TracedIndex. Documents are Megatron-LM's: sequences."""
        return origins_of(self._pieces_of(n))

    def _pieces_of(self, n: int) -> list[Piece]:
        arrays = self._opened()
        source, number = (0, n) if arrays.blend is None else (int(x[n]) for x in arrays.blend)
        return _pieces(self._sources[source], arrays.parts[source], number)

    def mixture(self, rows: int) -> dict[str, int]:
        """Tokens of each source in the first rows; weights are shares of whole samples."""
        blended = self._opened().blend
        given = (
            [rows] if blended is None else np.bincount(blended.sources[:rows], minlength=len(self._sources)).tolist()
        )
        return {x.name: count * self.seq_len for x, count in zip(self._sources, given, strict=True)}

    def _plan(self) -> list[Epochs]:
        """How often each source is passed over."""
        alone = len(self._sources) == 1
        sizes = [self._samples] if alone else source_sizes([x.weight for x in self._sources], self._samples)
        found = []
        for source, size in zip(self._sources, sizes, strict=True):
            try:
                found.append(epochs_of(source.files.lengths, size, self.seq_len))
            except DataError as error:
                raise DataError(f"source {source.name!r}: {error}") from error
        return found

    def _opened(self) -> _Arrays:
        """The arrays, from the cache if this process has not opened them yet."""
        if self._arrays is None:
            parts = [self._indices(x, y) for x, y in zip(self._sources, self._epochs, strict=True)]
            blended = self._blend([len(x.shuffle) for x in parts]) if len(parts) > 1 else None
            self._arrays = _Arrays(parts, blended)
        return self._arrays

    def _indices(self, source: TokenSource, epochs: Epochs) -> Indices:
        files, length = source.files, self.seq_len
        key = {"content": files.content_key, "seed": self._seed, "seq_len": length}
        made = self._cache.arrays(
            "megatron",
            key | epochs._asdict(),
            lambda: source_indices(files.lengths, epochs, length, self._seed)._asdict(),
        )
        return Indices(**made)

    def _blend(self, sizes: list[int]) -> Blend:
        """Raises DataError if a source has fewer samples than the blend wants of it."""
        weights = [x.weight for x in self._sources]
        key = {"weights": weights, "samples": self._samples}
        found = Blend(**self._cache.arrays("blend", key, lambda: blend(weights, self._samples)._asdict()))
        wanted = np.bincount(found.sources, minlength=len(sizes)).tolist()
        for source, want, size in zip(self._sources, wanted, sizes, strict=True):
            if want > size:
                raise DataError(
                    f"source {source.name!r}: Megatron-LM's blend wants {want} samples of it, but its rule prepares"
                    f' only {size}; train for other steps, give it another weight, or set data.order = "native"'
                )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays: a worker that is spawned maps them from the cache."""
        return self.__dict__ | {"_arrays": None}


def _pieces(source: TokenSource, index: Indices, number: int) -> list[Piece]:
    """What sample `number` takes of which documents."""
    at = int(index.shuffle[number])
    (first, offset), (last, end) = index.samples[at : at + 2].tolist()
    documents = index.documents[first : last + 1].tolist()
    begins = [offset] + [0] * (last - first)
    ends = [int(source.files.lengths[d]) for d in documents[:-1]] + [end + 1]
    return [Piece(source, d, a, b - a) for d, a, b in zip(documents, begins, ends, strict=True)]
