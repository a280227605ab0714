"""Small corpora, loaders over them, and global batches put together from all ranks, for the tests of this folder."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from components.config.data import Source
from components.config.training import DataLoader
from components.data.chat.encoder import ChatEncoder
from components.data.chat.template import load_chat_template
from components.data.documents import RandomAccess, Read, Sequential, place_of
from components.data.encoding import Encoder, TextEncoder, TokensEncoder, Where, text_in
from components.data.files import open_files
from components.data.fim import FimEncoder, Marks
from components.data.indexed import IndexedRows, SyntheticRows
from components.data.instruction import build_instruction_encoder
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


class Numbered:
    """Documents of given lengths whose tokens tell document and place: document d is 100·d, 100·d + 1, …"""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.fingerprint: dict[str, Any] = {"lengths": list(lengths)}

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        return 100 * index + np.arange(self.lengths[index])


MIXINGS = ("one", "tokens", "documents", "limited")


def mixed(
    folder: Path, kind: str, mixing: str, *, streams: int = 6, seed: int | None = 7, packing: Any = "concat"
) -> RowSource:
    """Small sources of one kind, mixed: "random", "sequential", "ids", "chat", "instruction", "fim", or "mixed", which
    is the first three; "synthetic" is one of rows."""
    if kind == "synthetic":
        return synthetic(4)
    several = mixing != "one"
    names, kinds = "abc" if several else ("",), ("random", "sequential", "ids")
    sources = [
        _source_of(kinds[i] if kind == "mixed" else kind, folder, name, i, streams, seed, mixing)
        for i, name in enumerate(names)
    ]
    return StreamedRows(
        sources,
        Packing(SEQ, kind=packing, window=2),
        unit="documents" if mixing == "documents" else "tokens",
        ending="repeat",
        skip_bad=False,
        fingerprint={"streams": streams},
    )


def _source_of(
    kind: str, folder: Path, name: str, number: int, streams: int, seed: int | None, mixing: str
) -> StreamSource:
    documents = texts((23, 9, 5)[number], (20, 30, 12)[number])
    encoder: Encoder = text_encoder()
    source: RandomAccess | Sequential
    if kind == "ids":
        source, encoder = Numbered([len(x) // 4 for x in documents]), TokensEncoder(1 << 20)
    elif kind in LEARNT:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(_talk(x)) + "\n" for x in documents))
        source, encoder = open_files(str(path), None), LEARNT[kind](name)
    else:
        path = folder / f"{name}.{'jsonl' if kind == 'random' else 'jsonl.gz'}"
        source = open_files(str(path if path.exists() else write_lines(path, documents)))
    epochs = 2 if mixing == "limited" and number == 1 else None
    dealt = deal(source, name=name, streams=streams, seed=seed, epochs=epochs, window=5)
    return StreamSource(name, dealt, encoder, (0.7, 0.2, 0.1)[number])


def _talk(text: str) -> dict[str, Any]:
    """A record that is text, a question with its answer, and a chat."""
    asked, said = text or "def", text[::-1] or "x"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"text": text, "asked": asked, "said": said, "messages": messages}


def _chat_encoder(name: str) -> Encoder:
    template = load_chat_template("tests/assets/tokenizer", "tests/assets/chat_templates/zephyr.jinja")
    assert template is not None
    return ChatEncoder(tokenizer(), template)


def _instruction_encoder(name: str) -> Encoder:
    return build_instruction_encoder(Source(kind="instruction", prompt="{asked}", answer="{said}"), tokenizer(), None)


def _fim_encoder(name: str) -> Encoder:
    draws: dict[str, Any] = {"rate": 0.7, "spm_rate": 0.4, "seed": 7, "source": name}
    return FimEncoder(tokenizer(), "text", marks=Marks(2001, 2002, 2003), add_bos=True, add_eos=True, **draws)


LEARNT: dict[str, Callable[[str], Encoder]] = {
    "chat": _chat_encoder,
    "instruction": _instruction_encoder,
    "fim": _fim_encoder,
}
"""Kinds of sources whose records are more than text, and what encodes them."""


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
