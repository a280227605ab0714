"""All cores: processes that encode chunks, whose results come back in the order of the chunks.

Each process has two threads, which encode a chunk each: the tokenizer lets go of Python's lock, so one parses and
copies while the other encodes, and they share the tokenizer's tables and its memory of words, which two processes drive
out of the processor's caches. More threads in a process wait for each other; the tokenizer's own leave cores idle while
Python parses and copies. Processes are spawned: a fork takes over locks that a thread of the parent may hold. Each has
two chunks in waiting, so that the writer may take its time; what is under way is bounded in number and bytes.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

from components.data.preprocess.encode import ChunkEncoder, EncodedChunk
from components.data.preprocess.inputs import Chunk
from components.runtime.errors import EspalierError

THREADS = 2
"""Of a process."""
WAITING = 2
"""Chunks that a process has beyond those that it encodes."""
BUDGET = 64 << 20
"""Bytes of content that are under way, unless one chunk alone is longer."""
TICK = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerDied(EspalierError):
    """A process that encodes has ended."""


class Pool:
    """Processes with `workers` threads in all; a context manager that ends them. `stop()` is asked again and again."""

    def __init__(self, encoder: ChunkEncoder, workers: int, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the workers have chosen to ignore them
        try:
            threads = [min(THREADS, workers - i) for i in range(0, workers, THREADS)]
            self._workers = [_Worker(encoder, i, count) for i, count in enumerate(threads)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[EncodedChunk]:
        """Encode, in order. Ends early when `stop()` says so. Raises WorkerDied, and what encoding raises."""
        source = enumerate(chunks)
        waiting = next(source, None)
        done: dict[int, EncodedChunk | Exception] = {}
        sizes: dict[int, int] = {}
        due = 0
        while not self._stop() and (waiting is not None or due in done or sizes):
            while waiting is not None and (worker := self._free(sizes, waiting[1])):
                sizes[waiting[0]] = waiting[1].size
                worker.give(*waiting)
                waiting = next(source, None)
            if due not in done:
                done.update(self._results())
                continue
            result = done.pop(due)
            del sizes[due]
            due += 1
            if isinstance(result, Exception):
                raise result
            yield result

    def _free(self, sizes: dict[int, int], chunk: Chunk) -> "_Worker | None":
        """Who takes the next chunk; None while there is enough under way."""
        if sizes and (len(sizes) > sum(x.room for x in self._workers) or sum(sizes.values()) + chunk.size > BUDGET):
            return None
        worker = min(self._workers, key=lambda x: len(x.given) - x.threads)
        return worker if len(worker.given) < worker.room else None

    def _results(self) -> Iterator[tuple[int, EncodedChunk | Exception]]:
        """What has come within a moment."""
        ready = wait([x.end_here for x in self._workers], TICK)
        return (x.take() for x in self._workers if x.end_here in ready)


class _Worker:
    """One process, and what it has been given."""

    def __init__(self, encoder: ChunkEncoder, number: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.end_here, there = context.Pipe()
        self.given: dict[int, str] = {}
        self.threads, self.room = threads, threads + WAITING
        self._number = number
        self._process: SpawnProcess = context.Process(target=_work, args=(there, encoder, threads), daemon=True)
        self._process.start()
        there.close()

    def give(self, number: int, chunk: Chunk) -> None:
        """Raises WorkerDied."""
        self.given[number] = str(chunk)
        with suppress(OSError):  # it has ended; the next look finds the end of the pipe
            self.end_here.send((number, chunk))

    def take(self) -> tuple[int, EncodedChunk | Exception]:
        """Raises WorkerDied."""
        try:
            number, result = self.end_here.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        del self.given[number]
        return number, result

    def end(self) -> None:
        """At once: it holds nothing that could be lost."""
        self._process.kill()
        self._process.join()
        self.end_here.close()

    def _died(self) -> WorkerDied:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = " (out of memory? try fewer --workers)" if code == -signal.SIGKILL else ""
        at = f" at {next(iter(self.given.values()))}" if self.given else ""
        return WorkerDied(f"worker {self._number} {how}{memory}{at}")


def _work(end: Connection, encoder: ChunkEncoder, threads: int) -> None:
    """The process. The main thread takes the chunks in, so that neither side ever waits for the other to listen."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    lock = threading.Lock()
    for _ in range(threads):
        threading.Thread(target=_encode, args=(end, lock, encoder, tasks), daemon=True).start()
    with suppress(EOFError, OSError):  # the parent has closed the pipe, or died
        while True:
            tasks.put(end.recv())


def _encode(end: Connection, lock: threading.Lock, encoder: ChunkEncoder, tasks: "queue.SimpleQueue[Any]") -> None:
    """A thread: one chunk after the other."""
    while True:
        number, chunk = tasks.get()
        done = _encoded(encoder, chunk)
        with lock, suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
            end.send((number, done))


def _encoded(encoder: ChunkEncoder, chunk: Chunk) -> EncodedChunk | Exception:
    try:
        return encoder.encode_chunk(chunk)
    except EspalierError as error:
        return error
    except Exception:  # a defect, told by the parent when its turn has come
        return RuntimeError(f"while encoding {chunk}:\n{traceback.format_exc()}")
