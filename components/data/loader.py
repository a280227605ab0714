"""Loader: deals the rows of each step to ranks and worker processes, and carries each row's cursor with it.

Rank d of D owns rows d, d + D, ...; worker w of W makes every W-th of those. So neither decides what a row holds, and
since cursors travel with the rows, whatever was prefetched but not trained on is simply made again after a resume.
torchdata's StatefulDataLoader was rejected: its state is one per rank and worker count, and so belongs to a layout.
"""

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, get_worker_info

from components.config.training import DataLoader
from components.data.origins import Listener, Traced
from components.data.rows import Counts, Cursor, Mixed, Row, RowSource, padding_row
from components.mesh.batch import Batch
from components.runtime.errors import ConfigError, DataError, EspalierError
from components.runtime.logging import logger


@dataclass(frozen=True)
class StepRows:
    """All rows of this rank for one step."""

    batch: Batch
    """The rows, in global order. # (rows, seq)"""
    cursors: Tensor
    """Where each row's stream goes on after this step. # (rows, width) int64"""


class _Block(NamedTuple):
    """What one worker makes of a step."""

    rows: Tensor  # (4, rows, seq) int64: the fields of a Row
    cursors: Tensor  # (rows, width) int64
    counts: Counts  # of the source's copy so far
    ended: bool  # no row of it holds data


class Loader:
    """The rows of one rank, step by step. Iterating starts at the loaded position, each time anew.

    Raises ConfigError if the rows cannot be dealt to `data_degree` ranks, or if the settings contradict each other.
    """

    def __init__(
        self, source: RowSource, *, global_batch: int, data_rank: int, data_degree: int, dataloader: DataLoader
    ) -> None:
        _check(source, global_batch, data_degree, dataloader)
        self._source, self._settings = source, dataloader
        self.global_batch = global_batch
        self._mine = range(data_rank, global_batch, data_degree)
        self._cursors: list[Cursor] | None = None  # None: the start, which takes reading, and a state may replace it
        self._counts: list[Counts] = []
        self._persistent: list[Any] = []  # torch's loader and its iterator, which own the worker processes
        weakref.finalize(self, _end, self._persistent)
        self._pin = dataloader.pin_memory and torch.accelerator.is_available()
        if dataloader.pin_memory and not self._pin:
            logger.info("dataloader.pin_memory is ignored: this machine has no accelerator")

    @property
    def streams(self) -> int:
        """Streams of the source; a saved state has one cursor for each."""
        return self._source.streams

    @property
    def rows(self) -> int:
        """Rows of this rank in each step."""
        return len(self._mine)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        found = self._source.fingerprint
        names = list(
            found.get("sources", ())
        )  # a cursor has its numbers by their order, in which equal facts may differ
        return found | {"order_of_sources": names} if names else found

    @property
    def ends(self) -> bool:
        """Whether there is a last step."""
        return self._source.ends

    def report(self) -> dict[str, int]:
        """What this rank has done since the iteration began, workers included: `skipped_records`, numbers of Counts."""
        names = [x.name for x in fields(Counts) if x.name != "skipped"]
        numbers = {name: sum(getattr(part, name) for part in self._counts) for name in names}
        return {"skipped_records": sum(self.skipped().values()), **numbers}

    def skipped(self) -> dict[str, int]:
        """Records of each source that this rank could not read since the iteration began; the sources of all ranks."""
        return {x: sum(part.skipped.get(x, 0) for part in self._counts) for x in self._source.counts.skipped}

    def mixture(self, table: Sequence[Sequence[int]]) -> dict[str, int]:
        """Tokens or documents, whatever weights are shares of, that the job has had of each source, by name.

        `table` as for `state_dict`. Empty where the source of rows does not know.
        """
        return self._source.mixture(table) if table and isinstance(self._source, Mixed) else {}

    def listen(self, listener: Listener) -> bool:
        """Have the documents of each row told as it is made, row by row, to a process that has no workers; False: the
        source of rows cannot tell. A row of nothing but padding has nothing to tell of."""
        if not isinstance(self._source, Traced):
            return False
        self._source.listener = listener
        return True

    def __iter__(self) -> Iterator[StepRows]:
        """Steps of this rank, until its own rows end; see `steps` for ranks in agreement. Raises DataError."""
        for blocks in self._in_workers() if self._settings.num_workers else self._here():
            ended = all(x.ended for x in blocks)
            self._counts = [_without(x) if ended else x.counts for x in blocks]
            if ended:
                return
            yield self._step(blocks)

    def steps(
        self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> Generator[StepRows, None, None]:
        """Steps that end on all ranks of the data-parallel group at once, without communication where they never end.

        With the ending `pad` those that are done give padding until the last one is; else all end before the first
        step that one of them cannot fill.
        """
        if not self.ends or group is None:
            yield from self
            return
        op = dist.ReduceOp.MAX if self._source.ending == "pad" else dist.ReduceOp.MIN
        own = iter(self)
        while True:
            step = next(own, None)
            more = torch.tensor(int(step is not None), device=device)
            dist.all_reduce(more, op, group=group)
            if not more.item():
                return
            yield step if step is not None else self._padding()

    def state_dict(self, table: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The position of the whole job, as JSON values. `table`: the last step's cursors of all rows, in global order.

        Streams beyond the batch have not begun; they keep the cursor that they were loaded with.
        """
        return {
            "kind": self._source.kind,
            "fingerprint": self.fingerprint,
            "streams": self.streams,
            "table": [list(x) for x in (*table, *self._rest(len(table)))],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position, whatever layout saved it. Raises DataError that lists how the data differ."""
        kind = self._source.kind
        saved = {"kind": state.get("kind"), **state.get("fingerprint", {})}
        here = {"kind": kind, **self.fingerprint}
        if differ := "; ".join(_differences(saved, here)):
            raise DataError(
                f"the saved loader state belongs to other data: {differ}; restore these, or start a new job"
            )
        self._cursors = self._source.resume(state["table"])
        _end(self._persistent)  # they know only the old position

    def _rest(self, rows: int) -> Sequence[Cursor]:
        """Cursors of the streams beyond the first so many, which have not begun."""
        return () if rows == self.streams else self._begun()[rows:]

    def _begun(self) -> list[Cursor]:
        """The cursor of each stream that the next iteration begins with."""
        if self._cursors is None:
            self._cursors = self._source.start()
        return self._cursors

    def _here(self) -> Iterator[list[_Block]]:
        """Blocks of each step, made in this process."""
        return ([x] for x in _blocks(self._source, self._position()))

    def _in_workers(self) -> Iterator[list[_Block]]:
        """Blocks of each step from worker processes, in their order; at most one process a row."""
        workers = min(self._settings.num_workers, self.rows)
        held = self._persistent if self._settings.persistent_workers else []
        if not held:
            held.append(self._torch_loader(workers))
            atexit.register(held.clear)
        held[1:] = [_started(held[0])]
        end = _end  # a generator may outlive its module's names, when the interpreter exits
        try:
            while True:
                made = [_next(held[1]) for _ in range(workers)]
                for error in (x for x in made if isinstance(x, EspalierError)):
                    end(held)  # its traceback holds this frame, so nothing here may hold the workers
                    raise error
                blocks = [x for x in made if isinstance(x, _Block)]
                if len(blocks) < workers:
                    return
                yield blocks
        finally:
            if held is not self._persistent:
                end(held)

    def _torch_loader(self, workers: int) -> TorchDataLoader[Any]:
        return TorchDataLoader(
            _WorkerRows(self._source, self._position()),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._settings.prefetch_factor,
            persistent_workers=self._settings.persistent_workers,
            collate_fn=_as_is,
            worker_init_fn=_calm,
            generator=torch.Generator(),  # else it draws from the global one, whenever a pass over the data begins
        )

    def _position(self) -> dict[int, Cursor]:
        """The loaded cursors of this rank's streams."""
        return {s: self._begun()[s] for s in self._mine}

    def _step(self, blocks: Sequence[_Block]) -> StepRows:
        """Interleave the workers' rows."""
        if len(blocks) == 1:
            rows, cursors = blocks[0].rows, blocks[0].cursors
        else:
            rows = blocks[0].rows.new_empty((len(Row._fields), self.rows, self._source.seq_len))
            cursors = blocks[0].cursors.new_empty((self.rows, blocks[0].cursors.shape[1]))
            for w, block in enumerate(blocks):
                rows[:, w :: len(blocks)] = block.rows
                cursors[w :: len(blocks)] = block.cursors
        batch = Batch(*rows)
        return StepRows(batch.pin() if self._pin else batch, cursors)

    def _padding(self) -> StepRows:
        """A step without labels."""
        row = padding_row(self._source.seq_len)
        batch = Batch(*(torch.from_numpy(np.tile(x, (self.rows, 1))) for x in row))
        return StepRows(batch, torch.tensor([self._begun()[s] for s in self._mine]))


def _check(source: RowSource, global_batch: int, data_degree: int, settings: DataLoader) -> None:
    """Raise ConfigError if the loader cannot be built."""
    if global_batch % data_degree:
        raise ConfigError(
            f"a global batch of {global_batch} rows cannot be dealt evenly to {data_degree} data-parallel ranks"
        )
    if global_batch > source.streams:
        raise ConfigError(
            f"data.streams = {source.streams}: fewer than the global batch of {global_batch} rows; raise it, or set -1"
        )
    if not settings.num_workers:
        for key, given in (
            ("persistent_workers", settings.persistent_workers),
            ("prefetch_factor", settings.prefetch_factor),
        ):
            if given:
                raise ConfigError(f"dataloader.{key} = {given}: needs dataloader.num_workers > 0")


def _blocks(source: RowSource, cursors: Mapping[int, Cursor]) -> Iterator[_Block]:
    """One block a step from the streams named; with the ending `pad` there is no end, but blocks that say `ended`.

    Counts begin anew.
    """
    source.counts = source.counts.fresh()
    streams = source.open(cursors)
    last = list(cursors.values())
    filler = padding_row(source.seq_len)
    while True:
        made = [next(x, None) for x in streams]
        missing = sum(x is None for x in made)
        if missing and source.ending != "pad":
            return
        last = [old if x is None else x[1] for x, old in zip(made, last, strict=True)]
        padding = missing * source.seq_len
        source.counts.padding_tokens += padding
        source.counts.row_tokens += padding
        rows = torch.empty(len(Row._fields), len(made), source.seq_len, dtype=torch.int64)
        _fill(rows.numpy(), [filler if x is None else x[0] for x in made])
        yield _Block(rows, torch.tensor(last), source.counts.copy(), missing == len(made))


def _without(block: _Block) -> Counts:
    """The counts without this block's places, since it is no step; what was skipped on the way to the end remains."""
    places = block.rows[0].numel()
    counts = block.counts
    return replace(counts, padding_tokens=counts.padding_tokens - places, row_tokens=counts.row_tokens - places)


def _fill(block: np.ndarray, rows: Sequence[Row]) -> None:
    """Write rows into a block, each number once. # (4, rows, seq)"""
    for r, row in enumerate(rows):
        for field, values in zip(block, row, strict=True):
            field[r] = values


class _WorkerRows(IterableDataset[_Block | EspalierError | None]):
    """What a worker process iterates: its blocks, then the error that ended them, or None."""

    def __init__(self, source: RowSource, cursors: Mapping[int, Cursor]) -> None:
        self._source, self._cursors = source, dict(cursors)

    def __iter__(self) -> Iterator[_Block | EspalierError | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = list(self._cursors)[worker::workers]
        try:
            yield from _blocks(self._source, {s: self._cursors[s] for s in streams})
        except EspalierError as error:  # as an item: torch would wrap what is raised into a traceback of its own
            yield error
            return
        yield None


def _started(loader: TorchDataLoader[Any]) -> Iterator[Any]:
    """Its iterator, with workers. A worker's death is told by `_next` alone: torch would raise it wherever training is
    when the signal comes, be it in the update of the weights."""
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _next(iterator: Iterator[Any]) -> Any:
    """The next item, or None. Raises DataError if a worker process has died, which shows within 5 s."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if error.__cause__ is None:  # a worker's own error, of which torch makes a new one
            raise
        raise DataError(
            f"a loader worker has been killed ({error}); if memory ran out, lower dataloader.num_workers or"
            " prefetch_factor; the job goes on from its last checkpoint"
        ) from error


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What differs between two fingerprints, by dotted names; of a table that only one of them has, just that."""
    for key in sorted(saved.keys() | here.keys()):
        was, now, name = saved.get(key), here.get(key), f"{within}{key}"
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{name}.")
        elif was != now and isinstance(was or now, Mapping):
            yield f"{name} {'is new' if was is None else 'is missing'}"
        elif was != now:
            yield f"{name} was {was!r}, is {now!r}"


def _end(held: list[Any], unregister: Callable[[Callable[[], None]], None] = atexit.unregister) -> None:
    """Drop the only references to worker processes, which ends them."""
    held.clear()
    unregister(held.clear)


def _as_is(item: Any) -> Any:
    return item


def _calm(_: int) -> None:
    """In a worker: leave signals to the training process, which may still want to write a checkpoint before it ends.

    Schedulers signal every process of a job. SIGTERM is obeyed only from the training process; Python tells who sent a
    signal only where `sigwaitinfo` exists, so elsewhere (macOS) SIGTERM keeps its meaning.
    """
    signal.set_wakeup_fd(-1)  # it is the training process's, which would take a signal to this one for its own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
