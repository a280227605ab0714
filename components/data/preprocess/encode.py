"""Tokens of one chunk: a pure step that any process or machine may do, in any order.

Texts are handed to the tokenizer by a quarter of a megabyte, since its objects take a hundred times the text's size; so
long ones go in pieces where the tokenizer allows it (`long_texts`).
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from components.data.preprocess.inputs import LINES, Chunk
from components.data.preprocess.long_texts import LONG, divisible, pieces
from components.data.preprocess.records import Bad, Texts, content, lines_of, records
from components.data.tokenizer import Tokenizer

BATCH = 1 << 18
LISTED = 10
"""Bad records that are located in a report; the others are counted."""


@dataclass(frozen=True)
class Recipe:
    """What decides which tokens a record gets, besides the tokenizer."""

    keys: tuple[str, ...]
    """Fields or columns that are encoded, each into files of its own."""
    bos: int | None
    """Token before each document; None: none."""
    eod: int | None
    """Token after each document; None: none."""
    dtype: str
    """Of the tokens, by NumPy's name."""
    skip: bool
    """Count bad records; False: nothing after the first of a chunk is encoded."""


@dataclass
class Part:
    """Documents of one key, one after the other."""

    tokens: np.ndarray
    """Of all documents. # (tokens,)"""
    lengths: np.ndarray
    """Tokens of each sequence. # (sequences,) int32"""
    sequences: np.ndarray
    """Sequences of each document: one for a text, none for an empty one. # (documents,) int32"""


@dataclass
class EncodedChunk:
    """What became of a chunk."""

    chunk: Chunk
    """Without its content."""
    parts: list[Part]
    """Of each key."""
    documents: int = 0
    lines: int = 0
    """Lines of the file that end in it."""
    characters: int = 0
    """Of all texts."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Bad records by kind."""
    bad: list[Bad] = field(default_factory=list)
    """The first of them."""


class ChunkEncoder:
    """Encodes chunks; can be pickled, and holds no state."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._tokenizer, self.recipe = tokenizer, recipe
        self._divisible = divisible(tokenizer.definition)

    def encode_chunk(self, chunk: Chunk) -> EncodedChunk:
        """Tokens of its documents, in order. Raises DataError: a file that cannot be read."""
        if chunk.kind == LINES:
            chunk = replace(chunk, raw=content(chunk))
        done = EncodedChunk(replace(chunk, raw=None), [], lines=lines_of(chunk, chunk.raw or b""))
        columns = [_Column(self._tokenizer, self.recipe, self._divisible) for _ in self.recipe.keys]
        for record in records(chunk, self.recipe.keys):
            if isinstance(record, Bad):
                done.dropped[record.kind] += 1
                done.bad += [record] if len(done.bad) < LISTED else []
                if not self.recipe.skip:
                    break
                continue
            done.documents += 1
            for column, texts in zip(columns, record, strict=True):
                done.characters += column.add(texts)
        done.parts = [x.part() for x in columns]
        return done


class _Column:
    """The documents of one key, as they come."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, divisible: bool) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe
        self._longest = LONG if divisible else sys.maxsize
        self._before = [] if recipe.bos is None else [recipe.bos]
        self._after = [] if recipe.eod is None else [recipe.eod]
        self._texts: list[str] = []
        self._counts: list[int] = []
        self._held = 0
        self._tokens: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._sequences: list[int] = []

    def add(self, value: Texts) -> int:
        """One more document; its characters."""
        texts = [value] if isinstance(value, str) else value
        sizes = [len(x) for x in texts]
        if max(sizes, default=0) > self._longest:
            self._encode()
            self._encode_long(texts)
            return sum(sizes)
        self._texts += texts
        self._counts.append(len(texts))
        self._held += sum(sizes)
        if self._held >= BATCH:
            self._encode()
        return sum(sizes)

    def part(self) -> Part:
        """All documents."""
        self._encode()
        tokens = np.concatenate([np.empty(0, self._recipe.dtype), *self._tokens])
        return Part(tokens, np.array(self._lengths, np.int32), np.array(self._sequences, np.int32))

    def _encode(self) -> None:
        """Tokens of the texts that wait. Empty texts are no sequences; begin and end belong to the first and last."""
        encoded = self._tokenizer.encode_batch(self._texts) if self._texts else []
        ids, at = list[list[int]](), 0
        for count in self._counts:
            document = [x for x in encoded[at : at + count] if x]
            at += count
            if document:
                document[0][:0] = self._before
                document[-1].extend(self._after)
            ids += document
            self._sequences.append(len(document))
        lengths = [len(x) for x in ids]
        self._lengths += lengths
        self._tokens.append(_array(ids, sum(lengths), self._recipe.dtype))
        self._texts, self._counts, self._held = [], [], 0

    def _encode_long(self, texts: Sequence[str]) -> None:
        """The same of one document, which has a long text."""
        dtype = self._recipe.dtype
        sequences = [[self._array_of(x) for x in pieces(text)] for text in texts if text]
        sequences[0].insert(0, np.array(self._before, dtype))
        sequences[-1].append(np.array(self._after, dtype))
        self._lengths += [sum(map(len, arrays)) for arrays in sequences]
        self._sequences.append(len(sequences))
        self._tokens += chain.from_iterable(sequences)

    def _array_of(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text)
        return _array([ids], len(ids), self._recipe.dtype)


def _array(ids: Sequence[Sequence[int]], count: int, dtype: str) -> np.ndarray:
    """Twice as fast as np.array of each. # (count,)"""
    return np.fromiter(chain.from_iterable(ids), dtype, count)
