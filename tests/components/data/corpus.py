"""Small corpora, loaders over them, and global batches put together from all ranks, for the tests of this folder."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import zstandard
from torch import Tensor

from components.config.training import DataLoader
from components.data.documents import RandomAccess, Read, Sequential, place_of
from components.data.encoding import Encoder, TextEncoder, Where, text_in
from components.data.files import open_files
from components.data.indexed import IndexedRows, SyntheticRows
from components.data.loader import Loader, StepRows
from components.data.mixture import StreamSource
from components.data.order import deal
from components.data.packing import Packing
from components.data.rows import Ending, RowSource
from components.data.streamed import StreamedRows
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


def readers(path: Path | str, field: str = "text") -> list[Callable[[], str]]:
    """What reads the text of each document at a path or URL, in natural order."""
    documents = open_files(str(path), (field,))
    if isinstance(documents, RandomAccess):
        reads: list[tuple[Read, object]] = [(partial(documents.document, i), documents) for i in range(len(documents))]
    else:
        reads = [(x, x) for x in documents.records(0)]
    return [partial(_text, read, field, partial(place_of, placed, i)) for i, (read, placed) in enumerate(reads)]


def _text(read: Read, field: str, where: Where) -> str:
    return text_in(read(), field, where)


def text_encoder(bos: bool = True, eos: bool = True) -> TextEncoder:
    return TextEncoder(tokenizer(), "text", add_bos=bos, add_eos=eos)


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
    encoder: Encoder | None = None,
    **packing: Any,
) -> StreamedRows:
    """Rows of one source. `packing`: further fields of Packing."""
    epochs = None if ending == "repeat" else 1
    dealt = deal(documents, name="", streams=streams, seed=seed, epochs=epochs, window=window)
    return StreamedRows(
        [StreamSource("", dealt, encoder or text_encoder(bos, eos))],
        Packing(seq_len, document_mask=mask, **packing),
        ending=ending,
        skip_bad=skip_bad,
        fingerprint={"streams": streams},
    )


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
