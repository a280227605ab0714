"""Corpora for the tests of preprocess, and what they become by an obvious version of it."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer

from components.data.preprocess.job import Options

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = ROOT / "tests/assets/tokenizer"
BOS, EOD = 0, 1
Record = dict[str, Any]


def corpus(count: int) -> list[Record]:
    """Documents of many lengths, some empty, some not English, some lists of texts."""
    words = ["def", "f(x):\n", "", "", "return", "1", "+", "x", "", "#", "ünïcode", "汉字", "😀", "<|end_of_text|>"]
    records: list[Record] = []
    for i in range(count):
        text = " ".join(words[(i * 7 + j) % len(words)] for j in range(i * i % 97))
        title: str | list[str] = ["", f"title {i}", "second"] if i % 5 == 0 else f"title {i}"
        records.append({"id": i, "text": text, "title": title if i % 11 else []})
    return records


def expected(
    records: list[Record], key: str = "text", bos: int | None = None, eod: int | None = EOD
) -> tuple[bytes, bytes]:
    """The .bin and .idx of a key, one document after the other."""
    backend = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    backend.encode_special_tokens = True
    tokens: list[int] = []
    lengths: list[int] = []
    ends = [0]
    for record in records:
        texts = record[key] if isinstance(record[key], list) else [record[key]]
        document = [backend.encode(x, add_special_tokens=False).ids for x in texts if x]
        if document and bos is not None:
            document[0] = [bos, *document[0]]
        if document and eod is not None:
            document[-1] = [*document[-1], eod]
        tokens += [x for ids in document for x in ids]
        lengths += [len(x) for x in document]
        ends.append(len(lengths))
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(ends))
    idx += struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(ends)}q", *lengths, *pointers, *ends)
    return struct.pack(f"<{len(tokens)}H", *tokens), idx


def written(prefix: Path | str) -> tuple[bytes, bytes]:
    """The two files."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def lines(records: list[Record]) -> bytes:
    """As JSON lines, every third in ASCII alone."""
    return b"".join(json.dumps(x, ensure_ascii=i % 3 == 0).encode() + b"\n" for i, x in enumerate(records))


def write(path: Path, records: list[Record]) -> Path:
    """A file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        texts = [x["text"] for x in records]
        titles = [x["title"] if isinstance(x["title"], list) else [x["title"]] for x in records]
        table = pyarrow.table({"id": range(len(records)), "title": titles, "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=17)
    else:
        path.write_bytes(compressed(lines(records), path.suffix))
    return path


def compressed(raw: bytes, suffix: str) -> bytes:
    """By two members, where the suffix is a compression's."""
    half = len(raw) // 2
    if suffix == ".gz":
        return gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    if suffix == ".zst":
        return zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    return raw


def options(output: Path, *inputs: Path | str, **given: Any) -> Options:
    """Of a job with the test tokenizer."""
    return Options(tuple(map(str, inputs)), str(output), str(TOKENIZER), **given)
