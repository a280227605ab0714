"""A file that changes under a run ends it, whatever reads it and however it changed; and says which and how."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import datasets as hugging_face
import pyarrow
import pyarrow.parquet
import pytest

from components.data.documents import BadRecord, DatasetRequest, RandomAccess, Sequential, check_unchanged
from components.data.files import open_files
from components.data.registry import open_path
from components.data.watch import LocalFile
from components.runtime.errors import DataError
from tests.components.data.corpus import loaders, run, streamed, texts, write_lines


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n{}")


def replaced(path: Path) -> None:
    beside = path.with_name("other")
    beside.write_bytes(path.read_bytes())
    beside.replace(path)


def rewritten(path: Path) -> None:
    raw, before = path.read_bytes(), path.stat()
    path.write_bytes(raw[:-1] + b" ")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def vanished(path: Path) -> None:
    path.unlink()


HOW: dict[Callable[[Path], None], str] = {
    truncated: "was truncated from {size} to {less} bytes",
    grown: "grew from {size} to {more} bytes",
    replaced: "was replaced by another",
    rewritten: "was written to",
    vanished: "has vanished",
}


def told(change: Callable[[Path], None], path: Path) -> str:
    """The message that is to come; for a file as it was."""
    size = path.stat().st_size
    how = HOW[change].format(size=size, less=size - 1, more=size + 3)
    return f"{path}: {how} while the run read it; restore the file as it was"


def lines(folder: Path) -> Path:
    return write_lines(folder / "x.jsonl", texts(20))


def parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(20)}), folder / "x.parquet", row_group_size=5)
    return folder / "x.parquet"


def text(folder: Path) -> Path:
    (folder / "x.txt").write_text("a document")
    return folder / "x.txt"


@pytest.mark.parametrize("change", HOW)
@pytest.mark.parametrize("write", [lines, parquet, text])
def test_at_a_read_and_when_an_epoch_begins(
    write: Callable[[Path], Path], change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = write(tmp_path)
    source = open_files(str(path))
    assert isinstance(source, RandomAccess)
    source.document(0)
    check_unchanged(source)
    message = told(change, path)
    change(path)
    for look in (lambda: source.document(len(source) - 1), lambda: check_unchanged(source)):
        with pytest.raises(DataError) as error:
            look()
        assert str(error.value) == message
        assert not isinstance(error.value, BadRecord)


@pytest.mark.parametrize("change", HOW)
@pytest.mark.parametrize("moment", ["before a pass", "in mid-pass"])
def test_streams(change: Callable[[Path], None], moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.data.jsonlines.EVERY", 4)
    path = write_lines(tmp_path / "x.jsonl.gz", texts(20))
    source = open_files(str(path))
    assert isinstance(source, Sequential)
    records = source.records(0)
    message = told(change, path)
    if moment == "in mid-pass":
        for _ in range(6):
            next(records)()
    change(path)
    with pytest.raises(DataError) as error:
        next(source.records(0)) if moment == "before a pass" else [next(records) for _ in range(2)]
    assert str(error.value) == message


def test_a_stream_that_is_cut_off_is_not_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it skipped as one."""
    monkeypatch.setattr("components.data.jsonlines.CHUNK", 512)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(3000).hex().encode() + b"\n", 0) * 3)
    source = open_files(str(path))
    assert isinstance(source, Sequential)
    records = source.records(0)
    next(records)
    size = path.stat().st_size
    os.truncate(path, size - 700)
    with pytest.raises(DataError, match=rf"^{path}: was truncated from {size} to {size - 700} bytes") as error:
        list(records)
    assert not isinstance(error.value, BadRecord)


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    hugging_face.Dataset.from_dict({"text": texts(20)}).save_to_disk(str(folder))
    source = open_path(str(folder), DatasetRequest(str(folder), "text", 8, 10, 0, False))
    assert isinstance(source, RandomAccess)
    source.document(0)
    (file,) = folder.glob("*.arrow")
    replaced(file)
    message = f"{file}: was replaced by another while the run read it; restore the file as it was"
    with pytest.raises(DataError) as error:
        check_unchanged(source)
    assert str(error.value) == message
    with pytest.raises(DataError) as error:
        [source.document(i % 20) for i in range(300)]
    assert str(error.value) == message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_what_was_opened_before_workers_began_counts(name: str, workers: int, tmp_path: Path) -> None:
    """A change between the index and the worker's first read; bad records being skipped."""
    path = parquet(tmp_path) if name == "x.parquet" else write_lines(tmp_path / name, texts(20))
    source = streamed(open_files(str(path)), streams=2, skip_bad=True)
    message = told(grown, path)
    grown(path)
    (loader,) = loaders(source, 2, 1, workers)
    with pytest.raises(DataError) as error:
        next(run([loader], 1))
    assert str(error.value) == message


def test_a_file_in_a_corpus_that_is_kept_in_memory_is_missed_when_the_next_epoch_begins(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    source = open_files(str(path))
    assert isinstance(source, RandomAccess)
    for i in range(len(source)):
        source.document(i)
    batches = run(loaders(streamed(source, streams=1), 1, 1))
    next(batches)
    path.unlink()
    source.document(0)
    with pytest.raises(DataError) as error:
        list(batches)
    assert str(error.value) == f"{path}: has vanished while the run read it; restore the file as it was"


def test_reading_looks_at_the_open_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    file = LocalFile(tmp_path / "x")
    assert file.read(2, 5) == b"234"
    with file.open() as opened:
        assert opened.read() == b"0123456789"
    with pytest.raises(DataError) as error:
        LocalFile(tmp_path / "no")
    assert str(error.value).startswith(f"{tmp_path}/no: cannot be read (No such file or directory)")
