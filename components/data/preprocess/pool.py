"""All cores: processes that encode chunks, whose results come back in the order of the chunks.

Processes of one thread each were preferred to the tokenizer's own threads, which wait for each other's caches (a sixth
of their time on two cores) and leave a core idle while Python parses and copies. They are spawned: a fork takes over
locks that a thread of the parent may hold. Each has one chunk to do and two in waiting, so that the writer may take its
time; what is under way is bounded in number and bytes.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

from components.data.preprocess.encode import ChunkEncoder, EncodedChunk
from components.data.preprocess.inputs import Chunk
from components.runtime.errors import EspalierError

WAITING = 3
"""Chunks that a worker has at once."""
BUDGET = 64 << 20
"""Bytes of content that are under way, unless one chunk alone is longer."""
TICK = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerDied(EspalierError):
    """A process that encodes has ended."""


class Pool:
    """Worker processes; a context manager that ends them. `stop()` is asked several times a second."""

    def __init__(self, encoder: ChunkEncoder, workers: int, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the workers have chosen to ignore them
        try:
            self._workers = [_Worker(encoder, i) for i in range(workers)]
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
        if sizes and (len(sizes) >= WAITING * len(self._workers) + 1 or sum(sizes.values()) + chunk.size > BUDGET):
            return None
        worker = min(self._workers, key=lambda x: len(x.given))
        return worker if len(worker.given) < WAITING else None

    def _results(self) -> Iterator[tuple[int, EncodedChunk | Exception]]:
        """What has come within a moment."""
        ready = wait([x.end_here for x in self._workers], TICK)
        return (x.take() for x in self._workers if x.end_here in ready)


class _Worker:
    """One process, and what it has been given."""

    def __init__(self, encoder: ChunkEncoder, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.end_here, there = context.Pipe()
        self.given: deque[tuple[int, str]] = deque()
        self._number = number
        self._process: SpawnProcess = context.Process(target=_work, args=(there, encoder), daemon=True)
        self._process.start()
        there.close()

    def give(self, number: int, chunk: Chunk) -> None:
        """Raises WorkerDied."""
        self.given.append((number, str(chunk)))
        with suppress(OSError):  # it has ended; the next look finds the end of the pipe
            self.end_here.send((number, chunk))

    def take(self) -> tuple[int, EncodedChunk | Exception]:
        """Raises WorkerDied."""
        try:
            number, result = self.end_here.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        self.given.popleft()
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
        at = f" at {self.given[0][1]}" if self.given else ""
        return WorkerDied(f"worker {self._number} {how}{memory}{at}")


def _work(end: Connection, encoder: ChunkEncoder) -> None:
    """The process. A thread takes the chunks in, so that neither side ever waits for the other to listen."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(end, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
            end.send((task[0], _encoded(encoder, task[1])))


def _receive(end: Connection, tasks: "queue.SimpleQueue[Any]") -> None:
    """Chunks until the parent closes or dies."""
    try:
        while True:
            tasks.put(end.recv())
    except (EOFError, OSError):
        tasks.put(None)


def _encoded(encoder: ChunkEncoder, chunk: Chunk) -> EncodedChunk | Exception:
    try:
        return encoder.encode_chunk(chunk)
    except EspalierError as error:
        return error
    except Exception:  # a defect, told by the parent when its turn has come
        return RuntimeError(f"while encoding {chunk}:\n{traceback.format_exc()}")
