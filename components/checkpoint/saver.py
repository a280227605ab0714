"""Saver: saves while training goes on, counts the saves that failed, and decides with all ranks when to give up.

A save in the background is one thread beside the training, which writes copies (`staging`) and commits them with
collectives of its own group. There is never more than one: a save that comes before the last has ended waits for it,
and that counts as time that training waited. A failed save is a message, not an error: earlier checkpoints are
untouched, and a disk may be cleared in the meantime. So many in a row that the job would lose its work are an error.

The thread is no daemon, since Python waits for such threads at its exit: a save is not cut off where nobody called
`finish`. Rejected: a process of its own, which would need the state a third time, and `dcp.async_save`, whose result
nobody has to look at.
"""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from components.checkpoint.boxes import Box
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.manifest import Kind
from components.checkpoint.ranks import describe
from components.checkpoint.staging import Stage
from components.checkpoint.state import of_model
from components.checkpoint.storage import Folder
from components.runtime.errors import CheckpointError, EspalierError, SaveError
from components.runtime.logging import logger

Mode = Literal["disabled", "async", "async_with_pinned_mem"]
UNDER_WAY, BROKEN, ENDED = range(3)
"""How far a save is on a rank; broken: its communication failed, so that the ranks may not know the same of it."""


@dataclass(frozen=True)
class SaveResult:
    """How a save has ended."""

    step: int
    kind: str
    """As its manifest has it; "hf" of what was saved only to be exported, which is no checkpoint of the job's."""
    bytes: int
    """Written, over all ranks; 0 if the checkpoint was there already, or if the save failed."""
    seconds: float
    """From the call of `save` to the end."""
    stall: float
    """Seconds that the thread that called `save` was held up."""
    error: str | None
    """Why it failed; the same on all ranks."""


@dataclass
class _Save:
    """One save, from the call to the report. Whichever thread it runs in, that thread alone writes to it."""

    step: int
    kind: Kind
    begun: float
    stall: float = 0.0
    thread: threading.Thread | None = None
    result: SaveResult | None = None
    row: tuple[str, ...] = ()
    """Errors of the failed saves in a row that it is the last of."""
    apart: bool = False
    """Whether it is no checkpoint of the job's, so that it ends no row."""
    broken: Exception | None = None
    everywhere: bool = False
    """Whether all ranks are known to have ended it."""

    def wait(self) -> None:
        """Until this rank has ended it."""
        if self.thread is not None:
            self.thread.join()


class Saver:
    """Saves through a Checkpointer, in the calling thread (mode "disabled") or in the background.

    The thread that creates it is the training thread: `save` and `poll` go by what that thread has done, which is alike
    on all ranks. Another thread may `save` and `finish` too, on all ranks, while the training thread does neither.
    """

    def __init__(self, checkpointer: Checkpointer, *, mode: Mode, max_failed_saves: int) -> None:
        self._checkpointer, self._ranks = checkpointer, checkpointer.ranks
        self._mode, self._max_failed = mode, max_failed_saves
        pinned = mode == "async_with_pinned_mem"
        if pinned and not torch.accelerator.is_available():
            self._log(logging.INFO, "checkpoint.async_mode: memory is not pinned: this machine has no accelerator")
        self._stage = Stage(self._ranks, pinned=pinned and torch.accelerator.is_available())
        self._owner = threading.get_ident()
        self._latest: _Save | None = None
        self._unreported: deque[_Save] = deque()
        self._failed: tuple[str, ...] = ()
        self._fatal: tuple[str, ...] = ()
        self.untold: list[SaveResult] = []
        """Results that a `poll` had when it raised for too many failures."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Box],
        state: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        job: JobIdentity,
        *,
        through: Checkpointer | None = None,
        kind: Kind = "training",
        dtype: torch.dtype | None = None,
        after: torch.Event | None = None,
        then: Callable[[Folder], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Save, or begin to; what becomes of it is for `poll` and `finish` to tell. Collective.

        When it returns, tensors and state may change. A `state` that is to be called may use the Checkpointer's group.
        `through`: another Checkpointer of that group. Of kind "model_only" only the model's tensors are taken. `after`:
        when their values are there, on an accelerator; None: when the current stream gets there. `then`: called on all
        ranks with the checkpoint once it is there, in the thread that saved it; a CheckpointError that it raises counts
        as a failed save. `wait`: save in this thread and without a copy, whatever the mode.
        """
        save, store = self._next(step, kind), through or self._checkpointer
        save.apart = through is not None
        taken = of_model(tensors) if kind == "model_only" else tensors
        given = state() if callable(state) else state

        def write(source: Mapping[str, Tensor | Box], held: Mapping[str, Any]) -> int:
            saved = store.save(step, source, held, job, kind, dtype)
            if then is not None:
                then(saved.folder)
            return saved.bytes

        if self._mode == "disabled" or wait:
            self._run(save, lambda: write(taken, given))
        else:
            self._begin(save, lambda: self._stage.take(taken, after, dtype, store.failing(step)), write, given)
        if self._is_owner():
            for earlier in self._unreported:
                earlier.everywhere = earlier.thread is None or earlier is not save

    def poll(self) -> list[SaveResult]:
        """From the training thread, every step: results of saves that have ended on all ranks. Collective.

        Costs an exchange of a number while a save is under way, else nothing. Raises SaveError on all ranks alike
        with the `max_failed_saves`-th failed save in a row, and if the ranks can no longer save together.
        """
        results = []
        while self._unreported and self._has_ended(self._unreported[0]):
            results.append(self._report())
        if self._fatal:
            self.untold = results
            raise SaveError(
                f"checkpoint.max_failed_saves = {self._max_failed}: the last {len(self._fatal)} saves have failed: "
                + "; ".join(self._fatal)
            )
        return results

    def wait(self) -> None:
        """Wait for the save that is under way; what became of it stays for `poll` to tell. From any thread.

        Nothing uses the Checkpointer's group then.
        """
        if self._latest is not None:
            self._latest.wait()

    def finish(self) -> list[SaveResult]:
        """Wait for the save that is under way. Collective, from the training thread.

        That thread gets all results that `poll` has not given; another one that of the last save, whoever began it.
        Raises SaveError only if the ranks can no longer save together: look at the results.
        """
        self.wait()
        if not self._is_owner():
            return [] if self._latest is None else [_result_of(self._latest)]
        results = []
        while self._unreported and self._has_ended(self._unreported[0]):
            results.append(self._report())
        return results

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Around training: an error of ours ends it only once the save that is under way has ended.

        Not so what is raised where ranks are gone, without which that would never be: it is not of ours here.
        """
        try:
            yield
        except EspalierError:
            self.wait()
            raise

    def _report(self) -> SaveResult:
        save = self._unreported.popleft()
        if len(save.row) >= self._max_failed:
            self._fatal = self._fatal or save.row
        return _result_of(save)

    def _is_owner(self) -> bool:
        return threading.get_ident() == self._owner

    def _next(self, step: int, kind: Kind) -> _Save:
        """The save that begins now, once the last has ended on this rank."""
        save = _Save(step, kind, time.perf_counter())
        self.wait()
        self._latest = save
        if self._is_owner():
            self._unreported.append(save)
        return save

    def _begin(
        self,
        save: _Save,
        take: Callable[[], dict[str, Box]],
        write: Callable[[Mapping[str, Box], Mapping[str, Any]], int],
        state: Mapping[str, Any],
    ) -> None:
        """Copy, and leave the rest to a thread."""
        held = copy.deepcopy(dict(state))
        try:
            boxes = take()
        except CheckpointError as error:
            self._conclude(save, 0, str(error))
            return
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.accelerator.set_device_index(device)  # else a thread begins with the first
                self._run(save, lambda: write(boxes, held))
            except Exception as error:  # raised where the training thread looks for it
                save.broken = error

        save.thread = threading.Thread(target=run, name="saver")
        save.stall = time.perf_counter() - save.begun
        save.thread.start()

    def _run(self, save: _Save, write: Callable[[], int]) -> None:
        """Save. Only what the ranks could not agree on is raised."""
        try:
            size, error = write(), None
        except CheckpointError as failure:
            size, error = 0, str(failure)
        self._conclude(save, size, error)

    def _conclude(self, save: _Save, size: int, error: str | None) -> None:
        seconds = time.perf_counter() - save.begun
        stall = save.stall if save.thread is not None else seconds
        if error is None and not save.apart:
            self._failed = ()
        if error is not None:
            self._failed = save.row = (*self._failed, error)
            allowed = f"{len(save.row)} of {self._max_failed} failed saves in a row (checkpoint.max_failed_saves)"
            self._log(logging.ERROR, f"{error}; earlier checkpoints are as they were; {allowed}")
        elif size:
            waited = f"training waited {stall:.2f} s"
            what = f"weights of step-{save.step}, to be exported" if save.apart else f"step-{save.step}"
            self._log(logging.INFO, f"saved {what}: {size / 1e6:.1f} MB in {seconds:.2f} s, {waited}")
        kind = "hf" if save.apart else save.kind
        save.result = SaveResult(save.step, kind, size, seconds, stall, error)

    def _has_ended(self, save: _Save) -> bool:
        """Whether a save has ended on all ranks, and agreed. Over the default group: the saves have theirs."""
        if save.everywhere:
            return True
        alive = save.thread is not None and save.thread.is_alive()
        standing = torch.tensor(UNDER_WAY if alive else ENDED if save.result else BROKEN)
        if self._ranks.size > 1:
            dist.all_reduce(standing, dist.ReduceOp.MIN)
        if standing == BROKEN:
            self._raise_broken(save)
        return bool(standing == ENDED)

    def _raise_broken(self, save: _Save) -> NoReturn:
        text = describe(save.broken) if save.broken is not None else ""
        texts = [text] * self._ranks.size
        if self._ranks.size > 1:
            dist.all_gather_object(texts, text)
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise SaveError(f"{self._checkpointer.failing(save.step)}: {told}") from save.broken

    def _log(self, level: int, text: str) -> None:
        if self._ranks.first:
            logger.log(level, "%s", text)


def _result_of(save: _Save) -> SaveResult:
    """The result of a save that has ended. Raises SaveError if it broke on this rank."""
    if save.result is None:
        text = describe(save.broken) if save.broken is not None else "its thread has ended"
        raise SaveError(f"step-{save.step} could not be saved: {text}") from save.broken
    return save.result
