"""Work over Ray gives the local job's bytes: its units without Ray, and where Ray is installed a local one with two
workers."""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from components.data.preprocess import over_ray
from components.data.preprocess.encode import ChunkEncoder, EncodedChunk
from components.data.preprocess.inputs import Chunk
from components.data.preprocess.job import Job, Stopped, preprocess
from components.data.preprocess.over_ray import encode_unit, preprocess_over_ray, units
from components.data.preprocess.pool import WorkerDied
from components.runtime.errors import ConfigError, DataError
from tests.components.data.preprocessing import corpus, expected, options, write, written

RECORDS = corpus(120)
NAMES = ("b.jsonl", "a.jsonl.gz", "c.parquet", "d.jsonl")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_ray, "CHUNK_BYTES", 300)
    monkeypatch.setattr(over_ray, "UNIT_BYTES", 500)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, RECORDS[i * 30 : i * 30 + 30]) for i, name in enumerate(NAMES)]


def here(job: Job, output: Any) -> Iterator[EncodedChunk]:
    """What actors do, in this process."""
    for unit in units(job.inputs, job.options.keys, output.progress.position):
        for done in encode_unit(job.encoder, unit):
            if isinstance(done, Exception):
                raise done
            yield done


def test_units_are_the_whole_input_from_any_chunk_on(files: list[Path], tmp_path: Path) -> None:
    whole = Job(options(tmp_path / "count", *files))
    with closing(whole.open()) as output:
        count = len(list(here(whole, output)))
    assert count > 20
    for at in range(0, count, 3):
        job = Job(options(tmp_path / f"out{at}", *files))
        with closing(job.open()) as output:
            for done in itertools.islice(here(job, output), at):
                output.write(done)
            output.save()
        with closing(job.open()) as output:
            job.fill(output, lambda _, job=job, output=output: here(job, output))
            output.finish(job.report(output.progress))
        assert written(tmp_path / f"out{at}_text_document") == expected(RECORDS)


def test_a_file_that_is_another_on_the_worker_is_an_error(files: list[Path], tmp_path: Path) -> None:
    job = Job(options(tmp_path / "out", files[0]))
    unit = next(units(job.inputs, ("text",), over_ray.Position()))
    files[0].write_bytes(files[0].read_bytes()[:-5])
    [error] = encode_unit(job.encoder, unit)
    assert isinstance(error, DataError)
    assert "was truncated from" in str(error)


def test_standard_input_and_a_missing_ray_are_refused(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="--input -: standard input cannot be read by other machines"):
        preprocess_over_ray(options(tmp_path / "out", "-"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray: Ray Data is not installed .*; pip install 'espalier\[ray\]'"):
        preprocess_over_ray(options(tmp_path / "out", *files))


class Deadly(ChunkEncoder):
    """Its process ends at any chunk."""

    def encode_chunk(self, chunk: Chunk) -> EncodedChunk:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestRay:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("ray.data", reason="the extra `ray` is not installed")

    def test_bytes_are_the_local_jobs_also_when_stopped_and_gone_on_with(
        self, files: list[Path], tmp_path: Path
    ) -> None:
        asked = itertools.count()
        with pytest.raises(Stopped):
            preprocess_over_ray(options(tmp_path / "ray", *files), workers=2, stop=lambda: next(asked) == 9)
        report = preprocess_over_ray(options(tmp_path / "ray", *files), workers=2)
        local = preprocess(options(tmp_path / "local", *files), 2)
        assert written(tmp_path / "ray_text_document") == written(tmp_path / "local_text_document") == expected(RECORDS)
        assert report["documents"] == local["documents"] == 120

    def test_an_address_where_nobody_is_is_told_at_once(self, files: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--ray 127\.0\.0\.1:1: cannot be reached \(.*refused"):
            preprocess_over_ray(options(tmp_path / "out", *files), "127.0.0.1:1")

    def test_errors_are_told_in_their_order(
        self, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = tmp_path / "z.jsonl"
        bad.write_bytes(files[0].read_bytes() + b"{'no': 'JSON'}\n")
        with pytest.raises(DataError, match=r"z\.jsonl:31:2: not valid JSON"):
            preprocess_over_ray(options(tmp_path / "bad", *files, bad), workers=2)
        monkeypatch.setattr("components.data.preprocess.job.ChunkEncoder", Deadly)
        with pytest.raises(
            WorkerDied, match=r"over Ray: 4 processes ended, one after the other, at .*b\.jsonl, bytes 0 to"
        ):
            preprocess_over_ray(options(tmp_path / "dead", *files), workers=2)
