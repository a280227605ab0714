"""Small corpora, loaders over them, and global batches put together from all ranks, for the tests of this folder."""

import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import zstandard
from torch import Tensor

from components.config.training import DataLoader
from components.data.documents import RandomAccess, Read, Sequential
from components.data.files import open_files
from components.data.indexed import IndexedRows, SyntheticRows
from components.data.loader import Loader, StepRows
from components.data.order import RandomDeal, WindowedDeal
from components.data.rows import Ending, RowSource
from components.data.streamed import Packing, StreamedRows
from components.data.tokenizer import Tokenizer, load_tokenizer

SEQ = 16


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer("tests/assets/tokenizer")


def texts(count: int, longest: int = 40) -> list[str]:
    """Documents of 0 to `longest` words."""
    rng = Random(count)
    return [
        " ".join(rng.choice(("def", "return", "x", "self", "im")) for _ in range(rng.randint(0, longest)))
        for _ in range(count)
    ]


def write_lines(path: Path, documents: Sequence[str]) -> Path:
    """JSON lines, compressed by the extension."""
    raw = "".join(json.dumps({"text": x}) + "\n" for x in documents).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, lambda x: x)
    path.write_bytes(pack(raw))
    return path


def readers(path: Path | str) -> list[Read]:
    """What reads each document at a path, in natural order."""
    documents = open_files(str(path), "text")
    if isinstance(documents, RandomAccess):
        return [partial(documents.document, i) for i in range(len(documents))]
    return list(documents.records(0))


def streamed(
    documents: RandomAccess | Sequential,
    *,
    streams: int,
    seed: int | None = 1,
    ending: Ending = "repeat",
    window: int = 5,
    mask: bool = False,
    bos: bool = True,
    eos: bool = True,
    seq_len: int = SEQ,
    skip_bad: bool = False,
) -> StreamedRows:
    epochs = None if ending == "repeat" else 1
    deal: RandomDeal | WindowedDeal
    if isinstance(documents, RandomAccess):
        deal = RandomDeal(documents, streams=streams, seed=seed, epochs=epochs)
    else:
        deal = WindowedDeal(documents, streams=streams, seed=seed, epochs=epochs, window=window)
    packing = Packing(seq_len, bos, eos, mask)
    return StreamedRows(deal, tokenizer(), packing, ending=ending, skip_bad=skip_bad, fingerprint={"streams": streams})


def synthetic(global_batch: int) -> IndexedRows:
    return IndexedRows(SyntheticRows(3, 100, SEQ), global_batch=global_batch, document_mask=True, ending="repeat")


def loaders(source: RowSource, batch: int, degree: int, workers: int = 0, **settings: Any) -> list[Loader]:
    """The loaders of all ranks."""
    section = DataLoader(num_workers=workers, **settings)
    return [
        Loader(source, global_batch=batch, data_rank=d, data_degree=degree, dataloader=section) for d in range(degree)
    ]


def fields(step: StepRows) -> Tensor:
    """The batch of a step as one tensor. # (rows, 4, seq)"""
    b = step.batch
    return torch.stack([b.tokens, b.labels, b.positions, b.document_ids], dim=1)


def interleave(ranks: Sequence[Tensor]) -> Tensor:
    """Row j of rank d is row d + D·j."""
    return torch.stack(list(ranks), dim=1).flatten(0, 1)


def run(ranks: Sequence[Loader], steps: int | None = None) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Global batches, each with the table of cursors after it."""
    for parts in islice(zip(*ranks, strict=True), steps):
        yield interleave([fields(x) for x in parts]), interleave([x.cursors for x in parts]).tolist()
