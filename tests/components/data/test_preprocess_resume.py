"""Killed between any two things that it does to the disk, or at any instant, a job goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from components.data.preprocess import job, output, pool
from components.data.preprocess.job import Options, Stopped, preprocess
from components.data.preprocess.pool import WorkerDied
from components.runtime.errors import DataError
from tests.components.data.preprocessing import ROOT, corpus, expected, options, write, written

RECORDS = corpus(60)
KEYS = ("text", "title")


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(job, "open_tokenizer", cache(job.open_tokenizer))


@pytest.fixture
def options_of(tmp_path: Path) -> Callable[..., Options]:
    files = [write(tmp_path / x, RECORDS[i * 20 : i * 20 + 20]) for i, x in enumerate(("a.jsonl", "b.jsonl.gz"))]
    files.append(write(tmp_path / "c.parquet", RECORDS[40:]))
    return lambda name, **given: options(tmp_path / name, *files, keys=KEYS, **({"save_every": 0.0} | given))


def bytes_of(prefix: Path) -> list[tuple[bytes, bytes]]:
    return [written(f"{prefix}_{key}_document") for key in KEYS]


WANTED = [expected(RECORDS, key) for key in KEYS]


class Kills:
    """Ends the job before the `at`-th change of the disk."""

    def __init__(self) -> None:
        self.count, self.at = 0, -1

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise Killed
            return real(*args, **given)

        return call


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Kills:
    made = Kills()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes most of the time
    changes = {
        os: ("fsync", "replace"),
        Path: ("unlink", "rmdir", "mkdir"),
        output._Spool: ("write", "complete"),
        output: ("write_json", "_cut"),
    }
    for owner, names in changes.items():
        for name in names:
            monkeypatch.setattr(owner, name, made.around(getattr(owner, name)))
    return made


def test_killed_before_each_change_of_the_disk(
    options_of: Callable[..., Options], kills: Kills, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CHUNK_BYTES", 4000)
    preprocess(options_of("whole"), 0)
    changes = kills.count
    assert changes > 60
    assert bytes_of(tmp_path / "whole") == WANTED
    for at in range(1, changes + 1):
        name, kills.count, kills.at = f"killed{at}", 0, at
        with pytest.raises(Killed):
            preprocess(options_of(name), 0)
        kills.at = -1
        over = (tmp_path / f"{name}.report.json").exists() and not (tmp_path / f"{name}.partial/journal.json").exists()
        report = preprocess(options_of(name, overwrite=over), 0)  # over: all that was left was an empty folder
        assert bytes_of(tmp_path / name) == WANTED, at
        assert report["documents"] == len(RECORDS)
        assert not (tmp_path / f"{name}.partial").exists()


def test_what_was_not_saved_is_cut_off(options_of: Callable[..., Options], kills: Kills, tmp_path: Path) -> None:
    """As after a loss of power, when files are longer than the journal says, or hold anything at all there."""
    preprocess(options_of("whole"), 0)
    kills.count, kills.at = 0, kills.count // 2
    with pytest.raises(Killed):
        preprocess(options_of("out"), 0)
    kills.at = -1
    for file in (tmp_path / "out.partial").glob("*.[bie]*"):
        with file.open("ab") as opened:
            opened.write(b"nonsense" * 100)
    preprocess(options_of("out"), 0)
    assert bytes_of(tmp_path / "out") == WANTED


def stop_after(count: int) -> Callable[[], bool]:
    """True at the call after that many."""
    calls = iter(range(count))
    return lambda: next(calls, None) is None


def test_stopped_at_every_chunk_and_going_on_with_other_workers(
    options_of: Callable[..., Options], tmp_path: Path
) -> None:
    for _ in range(4):
        with pytest.raises(Stopped) as caught:
            preprocess(options_of("out"), 0, stop_after(2))
        documents = json.loads((tmp_path / "out.partial/journal.json").read_text())["progress"]["documents"]
        again = "run the same command again to go on"
        assert str(caught.value) == f"{tmp_path / 'out'}: stopped after {documents} documents; {again}"
    report = preprocess(options_of("out"), 2)
    assert bytes_of(tmp_path / "out") == WANTED
    assert report["documents"] == len(RECORDS)


def stopped(given: Options) -> None:
    with pytest.raises(Stopped):
        preprocess(given, 0, stop_after(4))


def test_a_stopped_run_of_something_else_is_refused_with_what_differs(
    options_of: Callable[..., Options], tmp_path: Path
) -> None:
    stopped(options_of("out"))
    with pytest.raises(DataError) as caught:
        preprocess(options_of("out", append_eod=False, dtype="int32"), 0)
    assert str(caught.value) == (
        f"{tmp_path}/out.partial: a stopped run that was given something else: end token was 1, is None; dtype was"
        " uint16, is int32; give the same to go on with it, or --overwrite to begin anew"
    )
    before = job.Job(options_of("out")).fingerprint["inputs"]
    write(tmp_path / "a.jsonl", RECORDS[:20])
    after = job.Job(options_of("out")).fingerprint["inputs"]
    with pytest.raises(DataError) as caught:
        preprocess(options_of("out"), 0)
    assert f": inputs was {before}, is {after}; give" in str(caught.value)
    assert before != after
    preprocess(options_of("out", overwrite=True), 0)
    assert bytes_of(tmp_path / "out") == WANTED


def test_overwriting_goes_on_with_its_own_stopped_run(options_of: Callable[..., Options], tmp_path: Path) -> None:
    preprocess(options_of("out", append_eod=False), 0)
    stopped(options_of("out", overwrite=True))
    assert bytes_of(tmp_path / "out") == [expected(RECORDS, key, eod=None) for key in KEYS]  # until the end
    chunks = []
    preprocess(
        options_of("out", overwrite=True), 0, show=lambda job, position: chunks.append(position) or (lambda *_: None)
    )
    assert chunks[0] != job.Position()
    assert bytes_of(tmp_path / "out") == WANTED


def test_finished_files_are_refused(options_of: Callable[..., Options], tmp_path: Path) -> None:
    preprocess(options_of("out"), 0)
    with pytest.raises(DataError) as caught:
        preprocess(options_of("out"), 0)
    assert str(caught.value) == (
        f"{tmp_path}/out_text_document.bin: is there already; choose another --output, or replace it with --overwrite"
    )


def test_two_at_once_are_refused(options_of: Callable[..., Options], tmp_path: Path) -> None:
    opened = job.Job(options_of("out")).open()
    with pytest.raises(DataError) as caught:
        preprocess(options_of("out"), 0)
    assert str(caught.value) == f"{tmp_path}/out: another process is writing there; wait for it, or stop it"
    opened.close()
    preprocess(options_of("out"), 0)
    assert bytes_of(tmp_path / "out") == WANTED


def test_damaged_remains_are_told(options_of: Callable[..., Options], tmp_path: Path) -> None:
    stopped(options_of("out"))
    folder = tmp_path / "out.partial"
    size = (folder / "text.bin").stat().st_size
    os.truncate(folder / "text.bin", size - 1)
    with pytest.raises(DataError) as caught:
        preprocess(options_of("out"), 0)
    assert str(caught.value) == (
        f"{folder}/text.bin: has {size - 1} bytes, but the journal says {size}; remove {folder} to begin anew"
    )
    (folder / "journal.json").write_text("{")
    with pytest.raises(DataError, match=r"journal\.json: not valid JSON"):
        preprocess(options_of("out"), 0)


def test_a_file_that_changes_while_it_is_read_is_told(options_of: Callable[..., Options], tmp_path: Path) -> None:
    def show(made: job.Job, position: job.Position) -> job.Show:
        return lambda read, progress: os.utime(tmp_path / "a.jsonl", ns=(1, 1))

    with pytest.raises(DataError) as caught:
        preprocess(options_of("out"), 0, show=show)
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl: was written to while the run read it; restore the file as it was"
    )
    assert not (tmp_path / "out_text_document.idx").exists()


def test_a_worker_that_is_killed_is_told_and_the_job_goes_on(
    options_of: Callable[..., Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool._Worker.give

    def give(worker: Any, number: int, chunk: Any) -> None:
        real(worker, number, chunk)
        if number == 5:
            worker._process.kill()

    monkeypatch.setattr(pool._Worker, "give", give)
    with pytest.raises(
        WorkerDied, match=r"^worker 0 was ended by SIGKILL \(out of memory\? try fewer --workers\) at "
    ) as caught:
        preprocess(options_of("out"), 1)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    preprocess(options_of("out"), 0)
    assert bytes_of(tmp_path / "out") == WANTED


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from components.data.preprocess import job
from scripts.preprocess_data import main
job.CHUNK_BYTES = 20_000
sys.exit(main(sys.argv[1:]))
"""


def begin(given: Options) -> subprocess.Popen[str]:
    """The tool, in a process group of its own."""
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), "run", "--input", *given.inputs, "--workers", "2"]
    command += ["--output", given.output, "--tokenizer", given.tokenizer, "--keys", "text,title", "--save-every", "0"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_journal(process: subprocess.Popen[str], path: Path, before: str) -> None:
    """Until another one than before has been written, or it is over."""
    while process.poll() is None and (path.read_text() if path.exists() else "") in ("", before):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_instants_with_its_workers(seed: int, tmp_path: Path) -> None:
    records = corpus(6000)
    third = len(records) // 3
    names = ("a.jsonl", "b.jsonl.zst", "c.parquet")
    files = [write(tmp_path / x, records[i * third : (i + 1) * third]) for i, x in enumerate(names)]
    given, journal, random = options(tmp_path / "out", *files), tmp_path / "out.partial/journal.json", Random(seed)
    positions: list[str] = []
    while len(positions) < 12:
        process = begin(given)
        wait_for_journal(process, journal, positions[-1] if positions else "")
        time.sleep(random.random() * 0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        positions.append(journal.read_text())
    process = begin(given)
    process.communicate()
    assert len(set(positions)) > 5
    assert bytes_of(tmp_path / "out") == [expected(records, key) for key in KEYS]
    assert not journal.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_so_that_the_same_command_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    records = corpus(3000)
    given = options(tmp_path / "out", write(tmp_path / "a.jsonl", records))
    process = begin(given)
    wait_for_journal(process, tmp_path / "out.partial/journal.json", "")
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate()
    documents = json.loads((tmp_path / "out.partial/journal.json").read_text())["progress"]["documents"]
    assert stderr == f"{tmp_path}/out: stopped after {documents} documents; run the same command again to go on\n"
    assert (process.returncode, stdout) == (128 + number, "")
    process = begin(given)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == [expected(records, key) for key in KEYS]
