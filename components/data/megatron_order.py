"""Megatron-LM's order of token files: which documents make up which sample, and which source each sample comes from.

Pure functions of lengths, counts and a seed, equal to Megatron-LM's entry by entry, so that a job begun there goes on
here with the same samples. "Documents" are what Megatron-LM's GPT data calls so: the sequences of the files.

Its loops in C++ are vectorised here. The blend is sequential by nature, since each choice depends on the counts before
it; but two walks from slightly different counts soon meet, so that chunks of it can be walked side by side from guessed
counts, and mended where the guess was not met. A heap was rejected: the errors of all sources change at every step, at
rates of their own, and ties are common.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from components.runtime.errors import DataError

SURPLUS = 0.005
"""More samples than its share that each source of a blend is prepared for."""
SHORT, WIDE = 512, 1 << 16  # samples in a chunk at least; chunks times sources at most
SEPARATE_BELOW = 0.80
MAX_INT32, MAX_UINT32 = (1 << 31) - 1, (1 << 32) - 1
MAX_SOURCES = (1 << 15) - 1


class Indices(NamedTuple):
    """The three arrays of one source."""

    documents: np.ndarray
    """Documents of all epochs in order. # (epochs · documents,) int32"""
    samples: np.ndarray
    """Where each sample starts: position in `documents`, token offset. # (samples + 1, 2) int32 or int64"""
    shuffle: np.ndarray
    """Which of them is sample k. # (samples,) uint32 or int64"""


class Blend(NamedTuple):
    """Where sample k of a blend comes from."""

    sources: np.ndarray
    """# (samples,) int16"""
    samples: np.ndarray
    """Sample of that source. # (samples,) int64"""


class Epochs(NamedTuple):
    """How often the documents of one source are passed over: all that its indices depend on besides them and L."""

    tokens: int
    """In one epoch."""
    count: int
    separate: bool
    """The last epoch is shuffled by itself."""


def epochs_needed(tokens: int, samples: int, seq_len: int) -> int:
    """Smallest number of epochs of `tokens` each that hold the samples, the last label too.

    Raises DataError without tokens.
    """
    if tokens <= 0:
        raise DataError("no tokens in the documents of this split; give more documents, or another split")
    return ceil_div(samples * seq_len + 1, tokens)


def separate_final_epoch(tokens: int, epochs: int, samples: int, seq_len: int) -> bool:
    """Whether the last epoch is shuffled by itself: where less than 80 % of it is used."""
    if epochs == 1:
        return False
    last = samples - samples_before_final(tokens, epochs, seq_len)
    return last < int(SEPARATE_BELOW * ((tokens - 1) // seq_len))


def samples_before_final(tokens: int, epochs: int, seq_len: int) -> int:
    """Samples of all epochs but the last."""
    return ((epochs - 1) * tokens - 1) // seq_len


def epochs_of(lengths: np.ndarray, samples: int, seq_len: int) -> Epochs:
    """The epochs of a source that holds at least `samples` samples. Raises DataError without tokens."""
    tokens = int(lengths.sum(dtype=np.int64))
    count = epochs_needed(tokens, samples, seq_len)
    return Epochs(tokens, count, separate_final_epoch(tokens, count, samples, seq_len))


def document_index(count: int, epochs: int, state: np.random.RandomState, *, separate: bool) -> np.ndarray:
    """Documents 0 to `count` − 1 of all epochs, shuffled together; the last epoch apart if `separate`. # int32"""
    parts = [epochs - 1, 1] if separate else [epochs]
    made = [np.tile(np.arange(count, dtype=np.int32), x) for x in parts]
    for part in made:
        state.shuffle(part)
    return np.concatenate(made)


def sample_index(lengths: np.ndarray, documents: np.ndarray, seq_len: int) -> np.ndarray:
    """Where each sample starts, and where the last one ends: position in `documents` and token offset there.

    Sample i starts at token i·L of the documents one after the other. A shorter last one is left out.

    Args:
        lengths: Tokens of each document. # (documents,)
        documents: As `document_index` gives them.
        seq_len: Tokens in a row, L; a sample has one more, for the last label.
    """
    lengths = lengths[documents].astype(np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange((int(start[-1]) - 1) // seq_len + 1, dtype=np.int64) * seq_len
    at = np.searchsorted(start[:-1], tokens, "right") - 1
    at[0] = 0
    found = np.stack([at, tokens - start[at]], 1)
    small = max(len(documents), int(lengths.max())) <= MAX_INT32
    return found.astype(np.int32) if small else found


def shuffle_index(before: int, total: int, state: np.random.RandomState) -> np.ndarray:
    """A permutation of the samples: the first `before` among themselves, and the others. # uint32, or int64 if many"""
    dtype = np.uint32 if total < MAX_UINT32 - 1 else np.int64
    parts = [np.arange(before, dtype=dtype), np.arange(before, total, dtype=dtype)]
    for part in parts if before < total else parts[:1]:
        state.shuffle(part)
    return np.concatenate(parts)


def source_indices(lengths: np.ndarray, epochs: Epochs, seq_len: int, seed: int) -> Indices:
    """The indices of one source. One generator draws the documents' order and then the samples'."""
    state = np.random.RandomState(seed)
    documents = document_index(len(lengths), epochs.count, state, separate=epochs.separate)
    starts = sample_index(lengths, documents, seq_len)
    before = total = len(starts) - 1
    if epochs.separate:
        before = samples_before_final(epochs.tokens, epochs.count, seq_len)
    return Indices(documents, starts, shuffle_index(before, total, state))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, in float64 as numpy adds and divides them."""
    array = np.array(weights, np.float64)
    return (array / np.sum(array)).tolist()


def source_sizes(weights: Sequence[float], samples: int, surplus: float = SURPLUS) -> list[int]:
    """Samples that each source of a blend is prepared for."""
    return [ceil(ceil(samples * x) * (1 + surplus)) for x in normalized(weights)]


def blend(weights: Sequence[float], samples: int) -> Blend:
    """Sample after sample from the source that is furthest behind its share, the first of equals.

    Behind by w·max(i, 1) − count at sample i, in float64. Weights are normalised twice, which is not without effect on
    the last bit. Raises DataError for more sources than an int16 can name.
    """
    shares = normalized(normalized(weights))
    return _counted(_choices(shares, [samples + 1] * len(shares), samples))


def blend_all(sizes: Sequence[int]) -> Blend:
    """Every sample of every source, by the same rule with the sizes as weights; a spent source leaves."""
    total = sum(sizes)
    return _counted(_choices([x / total for x in sizes] if total else [], sizes, total))


def _choices(shares: Sequence[float], sizes: Sequence[int], samples: int) -> np.ndarray:
    """The source of each sample; one that has given its size is no longer asked. # (samples,) int16"""
    if len(shares) > MAX_SOURCES:
        raise DataError(f"{len(shares)} sources in one blend; at most {MAX_SOURCES} are allowed")
    weights, size = np.array(shares, np.float64), np.array(sizes, np.int64)
    counts, parts, at = np.zeros(len(sizes), np.int64), list[np.ndarray](), 0
    while at < samples:
        active = np.flatnonzero(counts < size)
        part = active[_greedy(weights[active], counts[active], at, samples)].astype(np.int16)
        ends = [np.flatnonzero(part == d)[size[d] - counts[d] - 1 :][:1] for d in active]  # when each is spent
        part = part[: min((int(x[0]) + 1 for x in ends if len(x)), default=len(part))]
        counts += np.bincount(part, minlength=len(sizes))
        parts.append(part)
        at += len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int16)


def _greedy(weights: np.ndarray, counts: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Choices for the samples `start` to `stop` − 1, after `counts` of each source. # (samples,) int64

    Chunks of them are walked at once, each from guessed counts at its start; those that began with other counts than
    the chunk before has ended with are walked again, until all fit. What fits is right, whatever was guessed.
    """
    chunks = max(1, min((stop - start) // SHORT, WIDE // len(weights)))
    steps = ceil_div(stop - start, chunks)
    begin = _guess(weights, counts, np.arange(chunks) * steps)
    end, chosen = np.empty_like(begin), np.empty((chunks, steps), np.int64)
    wrong = np.arange(chunks)
    while len(wrong):
        chosen[wrong], end[wrong] = _walk(weights, begin[wrong], start + wrong * steps, steps)
        wrong = 1 + np.flatnonzero((end[:-1] != begin[1:]).any(1))
        begin[wrong] = end[wrong - 1]
    return chosen.ravel()[: stop - start]


def _guess(weights: np.ndarray, counts: np.ndarray, further: np.ndarray) -> np.ndarray:
    """Counts after `further` samples, by largest remainders; often right. # (chunks, sources) float64"""
    share = further[:, None] * (weights / weights.sum())
    whole = np.floor(share)
    missing = further - whole.sum(1)
    rank = np.argsort(np.argsort(whole - share, axis=1, kind="stable"), axis=1)
    return counts + whole + (rank < missing[:, None])


def _walk(weights: np.ndarray, counts: np.ndarray, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices of several chunks, and the counts after them. # (chunks, steps) int64, (chunks, sources) float64"""
    given, behind, rows = counts.copy(), np.empty_like(counts), np.arange(len(start))
    chosen = np.empty((steps, len(start)), np.int64)
    for i in range(steps):
        at = np.maximum((start + i).astype(np.float64), 1.0)
        np.multiply(weights, at[:, None], out=behind)
        np.subtract(behind, given, out=behind)
        behind.argmax(1, out=chosen[i])  # the first of equals
        given[rows, chosen[i]] += 1.0
    return chosen.T, given


def _counted(sources: np.ndarray) -> Blend:
    """With each sample's number among those of its source."""
    order = np.argsort(sources, kind="stable")
    ordered = sources[order]
    first = np.searchsorted(ordered, ordered, "left")
    samples = np.empty(len(sources), np.int64)
    samples[order] = np.arange(len(sources)) - first
    return Blend(sources, samples)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up, exact for integers of any size."""
    return -(-a // b)
