"""The same job on many machines, through Ray Data: its tasks encode, this process writes; the same bytes.

Work is dealt in units: 8 MB of a plain file of lines, a megabyte of text files, and each other file as a whole, since
it can only be read from front to back. Tasks read units themselves, so all machines must see the input under the same
paths, and have this package and tokenizers at the same versions. Results come back in order; what a lost machine had is
done again by another, since units are pure. The journal, resuming and the report are the local job's.

Ray's own writers were rejected: they write a file for each block, in an order of their own, and cannot go on after a
kill. Rows of text, read by Ray's readers, were rejected too: other rules on what a record is, and other errors. Ray
Data repeats what is lost for ever; so that a unit that ends every process it comes to is told of, tries are counted.
"""

import functools
import importlib
import logging
import os
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from components.data.preprocess.encode import ChunkEncoder, EncodedChunk
from components.data.preprocess.inputs import LINES, TEXT, Chunk, Input, Position, StandardInput, chunks
from components.data.preprocess.job import CHUNK_BYTES, Job, Options, Show
from components.data.preprocess.pool import BUDGET, WorkerDied
from components.data.watch import DataFile, LocalFile, Stamp, require_same
from components.runtime.errors import ConfigError, DataError, EspalierError

UNIT_BYTES = 8 << 20
"""Of a plain file."""
BLOCK_BYTES = 4 << 20
"""Of results that a task gathers before it hands them on."""
TRIES = 4
"""Times that a unit is begun, before it is said that its processes end."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment of Ray, where it is not set otherwise."""


class Rest(NamedTuple):
    """A file that is read by one task, from a byte or row on."""

    input: Input
    number: int
    """Among all files."""
    offset: int


Unit = Chunk | Rest


def units(inputs: Sequence[Input], keys: Sequence[str], position: Position) -> Iterator[Unit]:
    """The work from a position on, in order. Raises DataError: a file that cannot be read."""
    number, offset = position.file, position.offset
    while number < len(inputs):
        here = inputs[number]
        if here.kind == TEXT:
            yield (texts := next(chunks(inputs, keys, CHUNK_BYTES, Position(number))))
            number += len(texts.files)
            continue
        if here.kind == LINES and isinstance(here.file, LocalFile) and not here.codec:
            for chunk in chunks([here], keys, UNIT_BYTES, Position(0, offset)):
                yield replace(chunk, first=number)
        else:
            yield Rest(here, number, offset)
        number, offset = number + 1, 0


def encode_batch(batch: dict[str, Any], held: Sequence[Any]) -> Iterator[dict[str, list[Any]]]:
    """A task of Ray Data.

    Args:
        batch: Numbers of units.
        held: A reference to the encoder and all units, inside a list, where Ray leaves it alone; and the `Tries`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder, work = _fetched(held[0])
    for number in batch["id"]:
        unit = work[int(number)]
        if importlib.import_module("ray").get(held[1].begin.remote(int(number))) > TRIES:
            lost = f"over Ray: {TRIES} processes ended, one after the other, at {_name(unit)} (out of memory?)"
            yield {"done": [WorkerDied(lost)]}
            return
        for done in encode_unit(encoder, unit):
            yield {"done": [done]}


class Tries:
    """How often each unit was begun. An actor."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count one more."""
        self._count[number] += 1
        return self._count[number]


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> tuple[ChunkEncoder, list[Unit]]:
    """Once a process: it has many tasks."""
    return importlib.import_module("ray").get(reference)


def encode_unit(encoder: ChunkEncoder, unit: Unit) -> Iterator[EncodedChunk | Exception]:
    """What becomes of each chunk of a unit, in order, or the error that ends it."""
    try:
        for chunk in _chunks(unit, encoder.recipe.keys):
            yield encoder.encode_chunk(chunk)
    except EspalierError as error:
        yield error
    except Exception:  # a defect, told where results are put in order
        yield RuntimeError(f"while encoding {_name(unit)}:\n{traceback.format_exc()}")


def _name(unit: Unit) -> str:
    return str(unit) if isinstance(unit, Chunk) else str(unit.input.file)


def _chunks(unit: Unit, keys: Sequence[str]) -> Iterator[Chunk]:
    if isinstance(unit, Chunk):
        yield replace(unit, files=tuple(_seen_here(file) for file in unit.files))
        return
    here = unit.input._replace(file=_seen_here(unit.input.file))
    for chunk in chunks([here], keys, CHUNK_BYTES, Position(0, unit.offset)):
        yield replace(chunk, first=unit.number)


def _seen_here(file: DataFile) -> DataFile:
    """The same file on this machine, which may number its devices otherwise. Raises DataError if it is another."""
    if not isinstance(file, LocalFile):
        return file
    here = LocalFile(file.path)
    require_same(file, Stamp(here.stamp.size, file.stamp.place, here.stamp.versions))
    return here


def _seen_everywhere(inputs: Sequence[Input]) -> list[Input]:
    """With whole paths: other processes have other working folders."""
    return [x._replace(file=LocalFile(x.file.path.absolute())) if isinstance(x.file, LocalFile) else x for x in inputs]


def preprocess_over_ray(
    options: Options,
    address: str | None = None,
    workers: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[Job, Position], Show] = lambda job, position: lambda read, progress: None,
) -> dict[str, Any]:
    """`preprocess` on the machines of a Ray cluster.

    Args:
        options: As there; paths are those of the cluster's machines.
        address: Of the cluster, `auto` for the one that this machine belongs to; None: start Ray here, for this job.
        workers: Tasks at a time, of one CPU each; None: all CPUs of the cluster.
        stop: Asked after each chunk whether to stop.
        show: As there.

    Raises ConfigError: no Ray, no cluster, no task; Stopped, WorkerDied, DataError.
    """
    if workers == 0:
        raise ConfigError("--workers 0: with --ray it is the number of tasks at a time; leave it out for all CPUs")
    job = Job(options)
    if isinstance(job.inputs[0].file, StandardInput):
        raise DataError("--input -: standard input cannot be read by other machines; leave --ray out, or give files")
    with closing(job.open()) as output:
        if not output.finishing:
            told = show(job, output.progress.position)
            with _ray(address, workers) as ray:
                size = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
                work = list(units(_seen_everywhere(job.inputs), options.keys, output.progress.position))
                with closing(_results(ray, job.encoder, work, size)) as results:
                    job.fill(output, lambda _: results, stop, told)
            for known in job.inputs:
                known.file.check()
        return output.finish(job.report(output.progress))


@contextmanager
def _ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """Ray, connected. Raises ConfigError."""
    os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ConfigError(f"--ray: Ray Data is not installed ({error}); pip install 'espalier[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
    try:
        _reach(address)
        ray.init(address or "local", **here, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray {address or ''}: cannot be reached ({error}); give a cluster's address") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError if nobody listens at a HOST:PORT: Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _results(ray: Any, encoder: ChunkEncoder, work: list[Unit], size: int) -> Generator[EncodedChunk]:
    """What becomes of all chunks, in order. Must be closed before Ray is, or it would start Ray anew.

    Raises WorkerDied, and what encoding raises.
    """
    if not work:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=BUDGET * size)
    numbers = ray.data.from_items([{"id": number} for number in range(len(work))], override_num_blocks=len(work))
    held = [ray.put((encoder, work)), ray.remote(num_cpus=0)(Tries).remote()]
    tasks = ray.data.TaskPoolStrategy(size=min(size, len(work)))
    rows = numbers.map_batches(encode_batch, fn_kwargs={"held": held}, batch_size=1, compute=tasks)
    results = iter(rows.iter_rows())
    try:
        for row in results:
            if isinstance(row["done"], Exception):
                raise row["done"]
            yield row["done"]
    except ray.exceptions.RayError as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise WorkerDied(f"over Ray: {type(error).__name__}: {what}") from error
    finally:
        results.close()
