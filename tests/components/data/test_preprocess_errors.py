"""Bad records are located, and stop the job or are counted; what cannot be read or written is told."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from components.data.parquet import Parquet
from components.data.preprocess import job, output
from components.data.preprocess.encode import LISTED
from components.data.preprocess.job import preprocess
from components.data.preprocess.pool import Pool
from components.data.watch import LocalFile
from components.runtime.errors import DataError
from tests.components.data.preprocessing import compressed, corpus, expected, lines, options, write, written

RECORDS = corpus(30)
MEND = "; mend the record, or drop such records with --on-bad-record skip"
BAD_LINES = {
    b'{"text": "a\xff"}': (":11:12: not UTF-8 (byte 0xff)", "not UTF-8"),
    b'{"text": "a': (":11:10: truncated JSON (Unterminated string starting at)", "truncated JSON"),
    b'{"text": "a"} x': (":11:15: not valid JSON (Extra data)", "not valid JSON"),
    b"[" * 100_000: (":11:1: JSON that is nested too deeply", "not valid JSON"),
    b'{"text": "a", "id": ' + b"9" * 5000 + b"}": (":11:1: JSON with a number of too many digits", "not valid JSON"),
    b'["text"]': (":11:1: a record must be an object with fields, not list", "not an object"),
    b'{"body": "a"}': (":11:1: no field 'text' (fields: 'body'; --keys names those to encode)", "no such field"),
    b'{"text": null}': (":11:1: field 'text' is null", "null"),
    b'{"text": 3}': (":11:1: field 'text' is int, not text", "not text"),
    b'{"text": ["a", 3]}': (":11:1: field 'text' is a list with int, not text", "not text"),
    b'{"text": "\\ud800"}': (
        ":11:1: field 'text' holds half of a surrogate pair, which is no character",
        "half of a surrogate pair",
    ),
}


@pytest.fixture(params=[100, 1 << 20], autouse=True)
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda x: x[:20].decode("latin1"))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_are_located_and_skipped_only_if_allowed(bad: bytes, suffix: str, tmp_path: Path) -> None:
    before, after = lines(RECORDS[:10]), lines(RECORDS[10:])
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compressed(before + bad + b"\n" + after, suffix))
    place, kind = BAD_LINES[bad]
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "out", file), 0)
    assert str(caught.value) == f"{file}{place}{MEND}"
    report = preprocess(options(tmp_path / "out", file, on_bad_record="skip"), 0)  # goes on
    assert written(tmp_path / "out_text_document") == expected(RECORDS)
    assert (report["dropped"], report["first_dropped"]) == ({kind: 1}, [f"{file}{place}"])


def test_lines_of_whitespace_are_counted_in_places_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b" \n\xef\xbb\xbf\n\t\r\n" + lines(RECORDS) + b"  \n\xef\xbb\xbf{\n ")
    report = preprocess(options(tmp_path / "out", file, on_bad_record="skip"), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS)
    what = "truncated JSON (Expecting property name enclosed in double quotes)"
    assert report["first_dropped"] == [f"{file}:{len(RECORDS) + 5}:2: {what}"]


def test_all_are_counted_and_the_first_are_located(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_bytes(b"\n".join(b"x" if i % 2 else x for i, x in enumerate(lines(RECORDS).splitlines())))
    files[1].write_bytes(b"y\n" + lines(RECORDS))
    report = preprocess(options(tmp_path / "out", *files, on_bad_record="skip"), 0)
    assert report["dropped"] == {"not valid JSON": 16}
    what = "not valid JSON (Expecting value)"
    assert report["first_dropped"] == [f"{files[0]}:{2 * i + 2}:1: {what}" for i in range(LISTED)]
    assert written(tmp_path / "out_text_document") == expected(RECORDS[::2] + RECORDS)
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "other", files[1]), 0)
    assert str(caught.value) == f"{files[1]}:1:1: {what}{MEND}"


def test_a_record_without_one_of_its_keys_is_dropped_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "only"}\n' + lines(RECORDS))
    preprocess(options(tmp_path / "out", file, keys=("text", "title"), on_bad_record="skip"), 0)
    for key in ("text", "title"):
        assert written(tmp_path / f"out_{key}_document") == expected(RECORDS, key)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compressed_files(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, RECORDS)
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(
        DataError, match=r"the compressed file is damaged or truncated from here on \(unexpected end"
    ) as caught:
        preprocess(options(tmp_path / "out", file), 0)
    line = int(str(caught.value).removeprefix(f"{file}:").split(":")[0])
    report = preprocess(options(tmp_path / "out", file, on_bad_record="skip"), 0)
    assert report["documents"] == line - 1
    assert report["dropped"] == {"damaged file": 1}
    assert written(tmp_path / "out_text_document") == expected(RECORDS[: line - 1])


def test_a_damaged_text_in_storage_is_a_bad_record(tmp_path: Path) -> None:
    url = "memory://damaged/a.txt.gz"
    fsspec.filesystem("memory").pipe("/damaged/a.txt.gz", compressed(b"some text", ".gz")[:-5])
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "out", url), 0)
    what = "the compressed file is damaged or truncated (unexpected end of the compressed data)"
    assert str(caught.value) == f"{url}:1:1: {what}{MEND}"


def test_rows_are_located_by_row_group(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    raw = pyarrow.array([b"a", b"b", b"c", b"\xff", None], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=2)
    places = [
        f"{file}: row group 1, row 1 of it (both from 0): not UTF-8 (byte 0xff)",
        f"{file}: row group 2, row 0 of it (both from 0): field 'text' is null",
    ]
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "out", file), 0)
    assert str(caught.value) == places[0] + MEND
    report = preprocess(options(tmp_path / "out", file, on_bad_record="skip"), 0)
    assert report["first_dropped"] == places
    assert written(tmp_path / "out_text_document") == expected([{"text": x} for x in "abc"])


def test_columns_without_a_type_and_of_categories(tmp_path: Path) -> None:
    nothing = pyarrow.table({"text": pyarrow.nulls(2), "id": [1, 2]})
    pyarrow.parquet.write_table(nothing, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(nothing.slice(0, 0), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [[], []]}), tmp_path / "c.parquet")
    named = pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
    pyarrow.parquet.write_table(named, tmp_path / "d.parquet")
    place = f"{tmp_path}/a.parquet: row group 0, row 0 of it (both from 0): field 'text' is null"
    assert message(tmp_path, tmp_path) == place + MEND
    report = preprocess(options(tmp_path / "out", tmp_path, on_bad_record="skip"), 0)
    assert report["dropped"] == {"null": 2}
    records = [{"text": x} for x in ([], [], "x", "y", "x")]
    assert written(tmp_path / "out_text_document") == expected(records)


def test_columns_of_views_and_columns_of_one_name(tmp_path: Path) -> None:
    views = pyarrow.array(["x", "longer than twelve bytes"] * 50, pyarrow.string_view())
    pyarrow.parquet.write_table(pyarrow.table({"text": views}), tmp_path / "a.parquet")
    preprocess(options(tmp_path / "out", tmp_path / "a.parquet"), 0)
    assert written(tmp_path / "out_text_document") == expected([{"text": x} for x in views.to_pylist()])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([views, views], names=["text", "text"]), tmp_path / "b.parquet"
    )
    assert message(tmp_path, tmp_path / "b.parquet", overwrite=True) == (
        f"{tmp_path}/b.parquet: has 2 columns 'text'; give them names of their own"
    )


def test_a_damaged_footer_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), file)
    raw = file.read_bytes()
    size = int.from_bytes(raw[-8:-4], "little")
    file.write_bytes(raw[: -8 - size] + b"\xff" * size + raw[-8:])
    what = rf"{file}: not a Parquet file, or damaged \(Couldn't deserialize thrift: .*\); write it again"
    assert re.fullmatch(what, message(tmp_path, file))
    with pytest.raises(DataError) as caught:
        Parquet([LocalFile(file)])
    assert re.fullmatch(what, str(caught.value))


def test_text_files_are_located(tmp_path: Path) -> None:
    for name, raw in {"a.txt": b"fine", "b.txt": b"one\ntw\xffo", "c.txt.gz": b"\x1f\x8b"}.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "out", tmp_path), 0)
    assert str(caught.value) == f"{tmp_path}/b.txt:2:3: not UTF-8 (byte 0xff){MEND}"
    report = preprocess(options(tmp_path / "out", tmp_path, on_bad_record="skip"), 0)
    assert report["dropped"] == {"not UTF-8": 1, "damaged file": 1}
    assert written(tmp_path / "out_text_document") == expected([{"text": "fine"}])


def message(tmp_path: Path, *inputs: Path | str, **given: Any) -> str:
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "out", *inputs, **given), 0)
    return str(caught.value)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    places = "looked in the current folder and the project's"
    allowed = ".jsonl, .json, .parquet, .txt, .text, .md, .rst, .py; all but .parquet also with .gz or .zst after it"
    assert message(tmp_path, "nowhere.jsonl") == f"--input nowhere.jsonl: no such file or folder ({places})"
    assert message(tmp_path, tmp_path / "*.no") == f"--input {tmp_path}/*.no: no such file or folder ({places})"
    assert message(tmp_path, tmp_path / "a.csv") == f"{tmp_path}/a.csv: unknown extension '.csv'; allowed: {allowed}"
    assert message(tmp_path, tmp_path / "empty") == (
        f"--input {tmp_path}/empty: no data files in this folder; allowed extensions: {allowed}"
    )
    assert message(tmp_path, "-", file) == "--input -: standard input cannot be joined with files; give it alone"
    assert message(tmp_path, file, keys=("a", "a")) == (
        "--keys a,a: give one or more different names, none with a slash"
    )
    assert message(tmp_path, file, keys=("a", "b"), plain=True) == (
        "--plain: 2 keys need names of their own; leave it out, or give one key"
    )
    assert message(tmp_path, file, dtype="float32") == (
        "--dtype float32: no such type; allowed: uint8, int8, int16, uint16, int32, int64"
    )
    for seconds in ("-1.0", "nan", "inf"):
        said = f"--save-every {seconds}: give seconds from 0 on, not infinitely many"
        assert message(tmp_path, file, save_every=float(seconds)) == said
    assert message(tmp_path, file, eod_token="<|no|>") == (
        "--eod-token <|no|>: the tokenizer has no such token; give one that it has"
    )
    assert not list(tmp_path.glob("out*"))


def test_columns_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), file)
    assert message(tmp_path, file) == f"{file}: no column 'text' (columns: id); name others in --keys"
    assert message(tmp_path, file, keys=("id",), overwrite=True) == (
        f"{file}: column 'id' holds int64, not text or lists of texts"
    )
    file.write_bytes(b"no parquet")
    assert message(tmp_path, file, overwrite=True).startswith(f"{file}: not a Parquet file, or damaged (")


def test_a_tokenizer_without_an_end_token_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    source = Path(options(tmp_path).tokenizer) / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    given = options(tmp_path / "out", write(tmp_path / "a.jsonl", RECORDS))
    changed = replace(given, tokenizer=str(folder))
    with pytest.raises(DataError) as caught:
        preprocess(changed, 0)
    assert str(caught.value) == (
        f"--tokenizer {folder}: names no end token; give one with --eod-token, or --no-append-eod"
    )
    preprocess(replace(changed, append_eod=False), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS, eod=None)


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CHUNK_BYTES", 100)
    given = options(tmp_path / "out", write(tmp_path / "a.jsonl", RECORDS), save_every=0.0)
    real, calls = output._Spool.write, iter(range(5))

    def write_until_full(spool: Any, part: Any) -> None:
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        real(spool, part)

    monkeypatch.setattr(output._Spool, "write", write_until_full)
    with pytest.raises(DataError) as caught:
        preprocess(given, 0)
    what = "cannot be written (No space left on device); check the folder, its permissions and space"
    assert str(caught.value) == f"{tmp_path}/out: {what}"
    monkeypatch.setattr(output._Spool, "write", real)
    begun = []
    preprocess(given, 0, show=lambda made, position: begun.append(position) or (lambda *_: None))
    assert begun[0].offset > 0
    assert written(tmp_path / "out_text_document") == expected(RECORDS)


class Broken:
    """An encoder with a defect."""

    def encode_chunk(self, chunk: Any) -> None:
        raise ZeroDivisionError("a defect")


def test_a_defect_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    made = job.Job(options(tmp_path / "out", write(tmp_path / "a.jsonl", RECORDS)))
    with Pool(Broken(), 1) as pool, pytest.raises(RuntimeError) as caught:  # pyrefly: ignore[bad-argument-type]
        list(pool.map(made.chunks(job.Position())))
    assert f"while encoding {tmp_path}/a.jsonl, bytes 0 to " in str(caught.value)
    assert "ZeroDivisionError: a defect" in str(caught.value)
