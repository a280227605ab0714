"""Text becomes the bytes that an obvious version gives, whatever the kind of file, the chunks and the workers."""

import io
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from components.data.preprocess import job
from components.data.preprocess.inputs import Position
from components.data.preprocess.job import Job, preprocess
from components.data.token_files import open_tokens
from components.runtime.errors import DataError
from tests.components.data.preprocessing import (
    BOS,
    EOD,
    TOKENIZER,
    compressed,
    corpus,
    expected,
    lines,
    options,
    write,
    written,
)

RECORDS = corpus(120)


@pytest.fixture(params=[700, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(job, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_file_gives_the_obvious_bytes(name: str, tmp_path: Path, chunk_bytes: int) -> None:
    preprocess(options(tmp_path / "out", write(tmp_path / name, RECORDS)), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_bytes_do_not_depend_on_workers(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CHUNK_BYTES", 300)
    names = ("b.jsonl", "a.jsonl.gz", "c.parquet", "d.jsonl.zst")
    files = [write(tmp_path / x, RECORDS[i * 30 : i * 30 + 30]) for i, x in enumerate(names)]
    preprocess(options(tmp_path / "out", *files), workers)
    assert written(tmp_path / "out_text_document") == expected(RECORDS)


def test_several_keys_in_one_pass_and_lists_are_sequences(tmp_path: Path, chunk_bytes: int) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    report = preprocess(options(tmp_path / "out", file, keys=("text", "title"), prepend_bos=True), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS, bos=BOS)
    assert written(tmp_path / "out_title_document") == expected(RECORDS, "title", bos=BOS)
    assert report["outputs"]["title"]["empty_documents"] == sum(x["title"] == [] for x in RECORDS)
    table = write(tmp_path / "b.parquet", RECORDS)
    preprocess(options(tmp_path / "table", table, keys=("title", "text"), prepend_bos=True), 0)
    assert written(tmp_path / "table_title_document") == expected(RECORDS, "title", bos=BOS)
    assert written(tmp_path / "table_text_document") == expected(RECORDS, bos=BOS)


def test_without_end_tokens_and_with_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    preprocess(options(tmp_path / "none", file, append_eod=False, plain=True), 0)
    assert written(tmp_path / "none") == expected(RECORDS, eod=None)
    preprocess(options(tmp_path / "other", file, eod_token="<|begin_of_text|>"), 0)
    assert written(tmp_path / "other_text_document") == expected(RECORDS, eod=BOS)


def test_text_files_are_a_document_each_in_sorted_order(tmp_path: Path, chunk_bytes: int) -> None:
    texts = {"b/two.md": "zwei", "a.txt": "one\nline 汉", "b/one.py.gz": "x = 1\n", "c.txt.zst": "", "d.rst": "\ufeffd"}
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(compressed(text.encode(), Path(name).suffix))
    (tmp_path / "in/.hidden").mkdir()
    (tmp_path / "in/.hidden/x.txt").write_text("no")
    (tmp_path / "in/unknown.bin").write_text("no")
    preprocess(options(tmp_path / "out", tmp_path / "in"), 0)
    order = ["a.txt", "b/one.py.gz", "b/two.md", "c.txt.zst", "d.rst"]
    records = [{"text": texts[x].removeprefix("\ufeff")} for x in order]
    assert written(tmp_path / "out_text_document") == expected(records)


def test_globs_are_sorted_and_inputs_keep_their_order(tmp_path: Path) -> None:
    for i, name in enumerate(["z/1.jsonl", "z/2.jsonl", "a.jsonl"]):
        write(tmp_path / name, RECORDS[i * 10 : i * 10 + 10])
    preprocess(options(tmp_path / "out", tmp_path / "z/*.jsonl", tmp_path / "a.jsonl"), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS[:30])


def test_blank_lines_bom_and_a_last_line_without_newline(tmp_path: Path, chunk_bytes: int) -> None:
    blank = b"\r\n\n\r\n \t\n\xef\xbb\xbf"  # a mark is before each record, as in files that were joined
    raw = b"\xef\xbb\xbf\n" + lines(RECORDS[:40]).replace(b"\n", blank)
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    preprocess(options(tmp_path / "out", tmp_path / "empty.jsonl", tmp_path / "a.jsonl"), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS[:40])


def test_a_file_without_records_gives_files_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    report = preprocess(options(tmp_path / "out", tmp_path / "a.jsonl"), 0)
    assert written(tmp_path / "out_text_document") == expected([])
    assert (report["documents"], report["outputs"]["text"]["tokens"]) == (0, 0)


def test_lines_longer_than_chunks(tmp_path: Path, chunk_bytes: int) -> None:
    long = [{"text": "a b\n" * 5000, "title": ""}, *RECORDS[:9], {"text": "汉字" * 5000, "title": ""}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        preprocess(options(tmp_path / name / "out", write(tmp_path / name / name, long)), 0)
        assert written(tmp_path / name / "out_text_document") == expected(long)


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(RECORDS))))
    preprocess(options(tmp_path / "out", "-"), 0)
    assert written(tmp_path / "out_text_document") == expected(RECORDS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_files_in_storage(name: str, tmp_path: Path, chunk_bytes: int) -> None:
    text = name == "a.txt"
    local = tmp_path / name
    local.write_text("text of a file") if text else write(local, RECORDS)
    with fsspec.open(f"memory://preprocess/{name}", "wb") as file:
        file.write(local.read_bytes())  # pyrefly: ignore[missing-attribute]
    preprocess(options(tmp_path / "out", f"memory://preprocess/{name}"), 0)
    assert written(tmp_path / "out_text_document") == expected([{"text": "text of a file"}] if text else RECORDS)


def test_the_trainer_reads_what_was_written(tmp_path: Path) -> None:
    preprocess(options(tmp_path / "out", write(tmp_path / "a.jsonl", RECORDS)), 0)
    tokens = open_tokens(str(tmp_path / "out_text_document"))
    bin_, _ = expected(RECORDS)
    assert len(tokens) == len(RECORDS)
    everything = np.concatenate([tokens.document(i) for i in range(len(tokens))])
    assert everything.tolist() == np.frombuffer(bin_, "<u2").tolist()


def test_dtypes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    preprocess(options(tmp_path / "wide", file, dtype="int32"), 0)
    bin_, idx = written(tmp_path / "wide_text_document")
    assert np.frombuffer(bin_, "<i4").tolist() == np.frombuffer(expected(RECORDS)[0], "<u2").tolist()
    assert idx[17] == 4
    with pytest.raises(DataError) as caught:
        preprocess(options(tmp_path / "narrow", file, dtype="uint8"), 0)
    assert str(caught.value) == (
        "--dtype uint8: holds ids up to 255, but the tokenizer has 2047; leave it out for uint16"
    )


def test_the_report_counts_and_says_what_it_is_made_of(tmp_path: Path) -> None:
    report = preprocess(options(tmp_path / "out", write(tmp_path / "a.jsonl", RECORDS)), 0)
    assert json.loads((tmp_path / "out.report.json").read_text()) == report
    tokens = len(expected(RECORDS)[0]) // 2
    assert report["documents"] == len(RECORDS)
    assert report["characters"] == sum(len(x["text"]) for x in RECORDS)
    assert report["outputs"]["text"] == {
        "path": str(tmp_path / "out_text_document"),
        "tokens": tokens,
        "bytes": 2 * tokens,
        "empty_documents": sum(not x["text"] for x in RECORDS),
    }
    assert report["dropped"] == {}
    assert report["tokens_per_second"] == pytest.approx(tokens / report["seconds"], rel=0.2)
    assert report["made_of"]["end token"] == str(EOD)
    assert len(report["made_of"]["tokenizer"]) == 16


def test_chunks_are_encoded_by_a_pure_step_that_can_be_sent_elsewhere(tmp_path: Path) -> None:
    """What the path over several machines relies on."""
    made = Job(options(tmp_path / "out", write(tmp_path / "a.jsonl.gz", RECORDS), keys=("text", "title")))
    encoder = pickle.loads(pickle.dumps(made.encoder))
    chunks = [pickle.loads(pickle.dumps(x)) for x in made.chunks(Position())]
    twice = [[encoder.encode_chunk(x) for x in chunks] for _ in range(2)]
    for first, second in zip(*twice, strict=True):
        assert [x.tokens.tolist() for x in first.parts] == [x.tokens.tolist() for x in second.parts]
    output = made.open()
    made.fill(output, lambda _: iter(pickle.loads(pickle.dumps(twice[0]))))
    output.finish({})
    output.close()
    assert written(tmp_path / "out_title_document") == expected(RECORDS, "title")


def test_tokenizer_folders_are_named_when_they_are_none(tmp_path: Path) -> None:
    assert job.open_tokenizer(str(TOKENIZER)).eos_id == EOD
    with pytest.raises(DataError) as caught:
        job.open_tokenizer("nowhere")
    assert str(caught.value) == "--tokenizer nowhere: no folder with a tokenizer.json in it"
