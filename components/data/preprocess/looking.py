"""What is in token files: numbers, and the first documents."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from components.data.preprocess.pieces import stem
from components.data.token_index import open_index
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
PIECE = 1 << 22  # tokens that are looked at, at once


def stats(prefix: str, *, validate: bool = False, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Documents, sequences, tokens, their type, bytes, and lengths of documents, of a pair of files.

    Opening checks the whole index; `validate` reads all tokens too: the smallest and the largest, which must be in
    the vocabulary if a tokenizer is given. Raises DataError: files or tokens that are not what they should be.
    """
    index, tokens = open_index(stem(prefix))
    header = index.header
    before = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    lengths = np.diff(before[index.documents])
    found: dict[str, Any] = {
        "documents": header.documents,
        "empty_documents": int((lengths == 0).sum()),
        "sequences": header.sequences,
        "tokens": int(before[-1]),
        "dtype": header.dtype.name,
        "bytes": tokens.size + index.file.size,
    }
    if header.documents:
        ranks = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        found["length"] = {"mean": round(float(lengths.mean()), 1), "min": int(lengths.min())}
        found["length"] |= {f"p{p}": int(x) for p, x in zip(PERCENTILES, ranks, strict=True)}
        found["length"]["max"] = int(lengths.max())
    if validate:
        found["ids"] = _extremes(prefix, tokenizer)
    return found


def head(prefix: str, count: int, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """The first documents in words: number, length, ids, and their text if a tokenizer is given. Raises DataError."""
    index, tokens = open_index(stem(prefix))
    dtype = index.header.dtype
    at = 0
    for number in range(min(count, index.header.documents)):
        first, last = index.documents[number : number + 2]
        size = int(index.lengths[first:last].sum(dtype=np.int64))
        ids = tokens.array(dtype, at, size).tolist()
        at += size * dtype.itemsize
        yield f"document {number}: {size:,} tokens: {' '.join(map(str, ids))}"
        if tokenizer is not None:
            if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
                raise DataError(_outside(prefix, min(ids), max(ids), tokenizer))
            yield tokenizer.decode(ids)


def table(found: dict[str, Any]) -> str:
    """Stats in lines."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {'n/a' if v is None else f'{v:,}'}" for k, v in value.items())
        lines.append(f"{name.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return "\n".join(lines)


def _extremes(prefix: str, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Smallest and largest id, None of no tokens. Raises DataError if they are not in the vocabulary."""
    index, tokens = open_index(stem(prefix))
    dtype = index.header.dtype
    if not tokens.size:
        return {"min": None, "max": None}
    low = high = 0
    for at in range(0, tokens.size, PIECE * dtype.itemsize):
        ids = tokens.array(dtype, at, min(PIECE, (tokens.size - at) // dtype.itemsize))
        low, high = (min(low, int(ids.min())) if at else int(ids.min())), max(high, int(ids.max()))
    if low < 0 or (tokenizer is not None and high >= tokenizer.vocab_size):
        raise DataError(_outside(prefix, low, high, tokenizer))
    return {"min": low, "max": high}


def _outside(prefix: str, low: int, high: int, tokenizer: Tokenizer | None) -> str:
    allowed = f"0 to {tokenizer.vocab_size - 1}" if tokenizer is not None else "numbers from 0 on"
    return f"{prefix}: token ids from {low} to {high}; the vocabulary has {allowed}: made with another tokenizer?"
