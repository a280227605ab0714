"""Data that fail: typed errors that name file and line, on all ranks alike, and nothing that follows is moved."""

import gzip
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from torch import Tensor

from components.data.documents import MEND, BadRecord
from components.data.files import open_files
from components.data.order import Document, Place
from components.data.streamed import StreamedRows
from components.runtime.errors import DataError
from tests.components.data.corpus import loaders, run, streamed, texts, tokenizer, write_lines
from tests.trainer.runs import facts, records
from tests.trainer.test_launch import QUIET
from tests.trainer.test_launch import run as run_script

DOCUMENTS = [f"{i} " + text for i, text in enumerate(texts(23))]
BAD = (3, 11, 12)


def jsonl(folder: Path, bad: bool) -> Path:
    lines = [b"{" if bad and i in BAD else json.dumps({"text": x}).encode() for i, x in enumerate(DOCUMENTS)]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines))
    return folder / "x.jsonl"


def parquet(folder: Path, bad: bool) -> Path:
    column = [None if bad and i in BAD[:2] else x.encode() for i, x in enumerate(DOCUMENTS)]
    if bad:
        column[BAD[2]] = b"\xff"
    table = pyarrow.table({"text": pyarrow.array(column, pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=5)
    return folder / "x.parquet"


def text(folder: Path, bad: bool) -> Path:
    for i, x in enumerate(DOCUMENTS):
        (folder / f"{i:02}.txt").write_bytes(b"\xff" if bad and i in BAD else x.encode())
    return folder


def compressed(folder: Path, bad: bool) -> Path:
    path = jsonl(folder, bad)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder / "x.jsonl.gz"


def rows(path: Path, workers: int, change: Callable[[StreamedRows], None] = lambda source: None) -> list[Tensor]:
    """All batches of three rows, shuffled, with bad records skipped."""
    source = streamed(open_files(str(path)), streams=3, seed=5, ending="pad", skip_bad=True)
    change(source)
    return [batch for batch, _ in run(loaders(source, 3, 1, workers))]


def starts_badly(document: Document) -> bool:
    record = document.read()
    return str(record["text"] if isinstance(record, Mapping) else record).startswith(tuple(f"{i} " for i in BAD))


def without(source: StreamedRows) -> None:
    """Take the same documents out of a good corpus by their text."""
    encoded = source._encoded
    setattr(  # noqa: B010  # one object's own
        source, "_encoded", lambda of, document: None if starts_badly(document) else encoded(of, document)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [jsonl, parquet, text, compressed])
def test_what_is_skipped_moves_nothing(write: Callable[[Path, bool], Path], workers: int, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    got = rows(write(tmp_path / "bad", True), workers)
    want = rows(write(tmp_path / "good", False), 0, without)
    assert len(got) == len(want) > 5
    assert all(bool((a == b).all()) for a, b in zip(got, want, strict=True))


def failing(source: StreamedRows) -> None:
    """A tokenizer that cannot do some documents."""

    class Failing:
        def encode(self, text: str) -> list[int]:
            if text.startswith(tuple(f"{i} " for i in BAD)):
                raise LookupError("no such word")
            return tokenizer().encode(text)

    setattr(source._sources[0].encoder, "_tokenizer", Failing())  # noqa: B010  # only what is read of it


@pytest.mark.parametrize(
    ("write", "name"),
    [(jsonl, "x.jsonl:13"), (compressed, "x.jsonl.gz:13"), (parquet, "x.parquet[row group 2]:13"), (text, "12.txt:1")],
)
def test_a_tokenizer_that_fails_names_the_document(
    write: Callable[[Path, bool], Path], name: str, tmp_path: Path
) -> None:
    path = write(tmp_path, False)
    source = streamed(open_files(str(path)), streams=1, seed=None, ending="pad")
    failing(source)
    (only,) = source._sources
    document = next(d for d in only.deal.open({0: Place(0, 0)})[0] if d.position == 12)
    with pytest.raises(BadRecord) as error:
        source._encoded(only, document)
    why = f"the tokenizer fails on this document (LookupError: no such word); {MEND}"
    assert str(error.value) == f"{path.parent if path.is_file() else path}/{name}: {why}"
    got, want = rows(path, 0, failing), rows(path, 0, without)
    assert all(bool((a == b).all()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("write", [jsonl, parquet, text])
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_vanishes_or_shrinks(
    write: Callable[[Path, bool], Path], workers: int, gone: bool, tmp_path: Path
) -> None:
    """Also where bad records are skipped: it is not one record that is bad."""
    path = write(tmp_path, False)
    source = streamed(open_files(str(path)), streams=1, seed=None, skip_bad=True)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if gone:
            file.unlink()
        else:
            os.truncate(file, 3)
    (loader,) = loaders(source, 1, 1, workers)
    with pytest.raises(DataError, match="^" + re.escape(str(files[0]))) as error:
        next(iter(loader))
    assert not isinstance(error.value, BadRecord)


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", texts(40))
    (loader,) = loaders(streamed(open_files(str(path)), streams=2, seed=None), 2, 1, 2)
    steps = iter(loader)
    next(steps)
    before = signal.getsignal(signal.SIGCHLD)
    assert before is signal.SIG_DFL  # so that it is the loader that tells, not whatever runs when the worker dies
    worker = multiprocessing.active_children()[0].pid
    assert worker
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.1)
    with pytest.raises(DataError, match=r"^a loader worker has been killed \(DataLoader worker \(pid") as error:
        for _ in steps:
            pass
    assert str(error.value).endswith(
        "; if memory ran out, lower dataloader.num_workers or prefetch_factor; the job goes on from its last checkpoint"
    )


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["kill", "raise"])
def test_all_ranks_end_and_the_job_goes_on(breaks: str, tmp_path: Path) -> None:
    """Two ranks of two workers each: one worker dies, or raises, once. The same command then does the rest."""
    arguments = (
        *QUIET,
        "--experimental.custom_import=tests.reliability.breaking_data",
        "--training.local_batch_size=6",
        "--training.steps=8",
        "--training.dataloader.num_workers=2",
        "--checkpoint.enable",
        "--checkpoint.interval=1",
        "--data.shuffle=false",
        f"--training.dataset_path={write_lines(tmp_path / 'x.jsonl', texts(400))}",
    )

    def job(name: str, breaks: str) -> tuple[int, str]:
        variables = {"BREAKS": breaks, "FROM": "40", "BROKEN_FILE": str(tmp_path / "broken"), "NGPU": "2"}
        done = run_script(*arguments, f"--job.dump_folder={tmp_path / name}", **variables)
        return done.returncode, done.stderr

    assert job("whole", "")[0] == 0
    began = time.monotonic()
    code, told = job("run", breaks)
    assert time.monotonic() - began < 60
    assert code == 2, told
    assert "Traceback" not in told
    failed = rf"{tmp_path}/x\.jsonl:41: reading this document fails with LookupError: no such word \(.*_data\.py:\d+\)"
    why = r"a loader worker has been killed \(" if breaks == "kill" else failed
    assert re.search(rf"^error: \[rank \d\] {why}", told, re.MULTILINE), told
    assert job("run", "")[0] == 0
    assert [facts(r) for r in records(tmp_path / "run")] == [facts(r) for r in records(tmp_path / "whole")]
