"""Records that cannot be read: the exact message, or skipped and counted without moving what follows."""

import gzip
import json
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from components.data import jsonlines
from components.data.documents import BadRecord
from components.data.files import open_files
from components.runtime.errors import DataError
from tests.components.data.corpus import loaders, readers, run, streamed, texts, write_lines

MEND = 'mend the record, or skip such records with data.on_bad_record = "skip"'
GOOD = b'{"text": "good"}'
CASES = {
    b'{"text": "cut of': "3:10: truncated JSON (Unterminated string starting at)",
    b'{"text": "x"': "3:13: truncated JSON (Expecting ',' delimiter)",
    b"{'text': 1}": "3:2: not valid JSON (Expecting property name enclosed in double quotes)",
    '{"text": "äö'.encode() + b'\xff"}': "3:13: not UTF-8 (byte 0xff)",
    b'{"id": 1, "body": "x"}': "3:1: no field 'text' (fields: 'id', 'body'; data.text_field names the field to read)",
    b'{"text": 5}': "3:1: field 'text' is int, not text",
    b'["text"]': "3:1: a record must be an object with fields, not list",
    b'{"text": "\\ud800"}': "3:1: field 'text' holds half of a surrogate pair, which is no character",
    b"[" * 100000: "3:1: JSON that is nested too deeply",
    b'{"text": "x", "id": ' + b"9" * 5000 + b"}": "3:1: JSON with a number of too many digits",
}


@pytest.mark.parametrize(("line", "message"), CASES.items())
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_message(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    raw = b"\n".join([GOOD, b"", line, GOOD])
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    reads = readers(path)
    assert (reads[0](), reads[2]()) == ("good", "good")
    with pytest.raises(BadRecord) as error:
        reads[1]()
    assert str(error.value) == f"{path}:{message}; {MEND}"


BOM = b"\xef\xbb\xbf"
BLANK = (b"", b"\r", b" ", b" \t \r", b"\t", b"\x0c", BOM, BOM + b" \r")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 22])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_lines_of_nothing_but_whitespace_are_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """Whatever their place is, in the file and in the pieces that it is read in; lines count them."""
    monkeypatch.setattr(jsonlines, "CHUNK", chunk)
    good = [b" " + GOOD, b"\t{", GOOD + b"\r", BOM + b"{"]
    for ends in product((b"", b"\n", b"\n\n", b" "), repeat=2):
        raw = ends[0] + b"\n".join(y for x in good for y in (x, *BLANK)) + ends[1]
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        reads = readers(path)
        assert [reads[0](), reads[2]()] == ["good", "good"]
        assert len(reads) == 4
        for i, column in ((1, 3), (3, 2)):
            with pytest.raises(BadRecord) as error:
                reads[i]()
            line = ends[0].count(b"\n") + i * (1 + len(BLANK)) + 1
            assert str(error.value).startswith(f"{path}:{line}:{column}: truncated JSON (Expecting property name")


def test_nothing_but_whitespace_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(BLANK))
    with pytest.raises(DataError) as error:
        open_files(str(path))
    assert str(error.value) == f"{path}: no records in 1 file(s); give a dataset that is not empty"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    for name, raw in (("x.jsonl", GOOD), ("x.txt", b"good")):
        path = tmp_path / name
        path.write_bytes(BOM + raw)
        assert [x() for x in readers(path)] == ["good"]


@pytest.mark.parametrize("extension", ["gz", "zst"])
def test_a_truncated_compressed_file(tmp_path: Path, extension: str) -> None:
    path = write_lines(tmp_path / f"x.jsonl.{extension}", texts(40))
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "y.jsonl").write_bytes(GOOD)
    records = readers(tmp_path)
    assert records[-1]() == "good"
    with pytest.raises(BadRecord) as error:
        records[-2]()
    what = "the compressed file is damaged or truncated from here on (unexpected end of the compressed data)"
    assert str(error.value) == f"{path}:{len(records) - 1}:1: {what}; {MEND}"


@pytest.mark.parametrize("extension", ["gz", "zst"])
def test_not_compressed_at_all(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.jsonl.{extension}"
    path.write_bytes(GOOD)
    (record,) = readers(path)
    with pytest.raises(BadRecord, match=f"^{path}:1:1: the compressed file is damaged or truncated from here on"):
        record()


@pytest.mark.parametrize("extension", ["gz", "zst"])
def test_several_members(tmp_path: Path, extension: str) -> None:
    pack = gzip.compress if extension == "gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"x.jsonl.{extension}"
    path.write_bytes(pack(GOOD + b"\n" + GOOD[:4]) + pack(GOOD[4:]))
    assert [x() for x in readers(path)] == ["good", "good"]


def test_bad_text_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    column = pyarrow.array([b"a", b"b", b"c", None, b"d\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(5)}), path, row_group_size=2)
    *good, null, latin = readers(path)
    assert [x() for x in good] == ["a", "b", "c"]
    for read, told in (
        (null, "[row group 1]:4:1: field 'text' is null, not text"),
        (latin, "[row group 2]:5:1: column 'text' is not UTF-8 (byte 0xff)"),
        (readers(path, "n")[3], "[row group 1]:4:1: field 'n' is int, not text"),
    ):
        with pytest.raises(BadRecord) as error:
            read()
        assert str(error.value) == f"{path}{told}; {MEND}"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("first\nö".encode() + b"\xfe")
    with pytest.raises(BadRecord) as error:
        readers(path)[0]()
    assert str(error.value) == f"{path}:2:2: not UTF-8 (byte 0xfe); {MEND}"


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_keeps_the_order_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    documents = texts(23)
    path = tmp_path / name
    lines = [b"broken" if i % 5 == 1 else json.dumps({"text": x}).encode() for i, x in enumerate(documents)]
    raw = b"\n".join(lines)
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    source = streamed(open_files(str(path)), streams=2, seed=None, ending="pad", skip_bad=True)
    (loader,) = loaders(source, 2, 1, workers)
    got = [x for x, _ in run([loader])]
    assert (loader.report()["skipped_records"], loader.skipped()) == (5, {"": 5})

    good = write_lines(tmp_path / "good.jsonl", documents)
    kept = streamed(open_files(str(good)), streams=2, seed=None, ending="pad")
    made = kept._encoded
    monkeypatch.setattr(kept, "_encoded", lambda source, x: None if x.position % 5 == 1 else made(source, x))
    expected = [x for x, _ in run(loaders(kept, 2, 1))]
    assert len(got) == len(expected)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_comes_out_of_the_loader_as_it_is(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([*[json.dumps({"text": x}).encode() for x in texts(6)], b"{"]))
    (loader,) = loaders(streamed(open_files(str(path)), streams=2, seed=None), 2, 1, workers)
    with pytest.raises(BadRecord) as error:
        list(loader)
    expected = f"{path}:7:2: truncated JSON (Expecting property name enclosed in double quotes); {MEND}"
    assert str(error.value) == expected
    assert error.value.exit_code == 2
