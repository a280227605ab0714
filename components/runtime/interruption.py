"""Interruption: SIGTERM, SIGINT, SIGUSR1 or the end of the job's time, met by all ranks with a valid checkpoint.

Two threads of each rank stand beside its training. The listener learns of a signal from C, through
`signal.set_wakeup_fd`: Python's own handlers run in the main thread, which may be in a compiler, wait for data or for a
collective that never ends. It asks all ranks (`requests`). The keeper takes the requests one by one: it closes the gate
on all ranks at the same section, saves from there, and then opens the gate or ends the process. The training thread is
not asked; at a stop it may as well be stuck, or fail when its peers have gone, which is then nobody's news.

Data that fail in training (a DataError) are met in the same way: one rank learns of it, the others wait for that one in
their next collective. Its training thread then asks for a stop, and ends with its error once all ranks have saved.

The price is that the state must be still wherever the gate may close, and a process that ends without Python's
finalization. Rejected: an exception in the main thread, which cannot be raised in C code; a flag that is looked at once
a step; and to fork a process that saves, which can neither use CUDA nor gloo.
"""

import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from components.runtime.distributed import all_reduce_max
from components.runtime.errors import DataError, EspalierError, ExitCode
from components.runtime.gate import Gate
from components.runtime.logging import logger
from components.runtime.requests import OwnRequests, Request, Requests, SharedRequests, Wish
from components.runtime.witness import running

SIGNALS = {signal.SIGTERM: Wish.STOP, signal.SIGINT: Wish.STOP, signal.SIGUSR1: Wish.SAVE}
ENDING = {Wish.STOP: ExitCode.STOPPED, Wish.FAIL: ExitCode.INPUT}
"""Wishes after which the job ends, and with which code."""
ECHO_SECONDS = 3.0
"""A second signal within that time is the first one's echo: a launcher passes on what the terminal sent to all."""
STAGES = ("has not heard of it", "waits for its training thread", "is saving", "is ending")
"""How far a rank can be with a request."""
WAKE = 0
"""On the wake-up socket: no signal, only a reason to look at the clock."""
SAYING_SECONDS = 1.0
LONGEST_SECONDS = 3600.0
"""Of a wait: a limit of centuries fits into no timer, and a listener that died of it would hear no signal."""
LISTED = 8


@dataclass(frozen=True)
class Actions:
    """What the job does with a request. All but `place` are called from the keeper's thread, on all ranks."""

    save: Callable[[Request], None]
    """Save the state as it is, or nothing if that has been done. The gate is closed. Raises EspalierError."""
    end: Callable[[Request], int]
    """Tell and close what is reported; the checkpoint is there. Gives the exit code."""
    leave: Callable[[int], NoReturn]
    """End the process with this exit code, whatever the other threads do."""
    place: Callable[[], str]
    """Where the training thread is, in words."""


class Interruption:
    """Answers to signals inside of `around`, which all ranks enter with their main threads.

    `group`: all ranks, over gloo; None for one. `grace`: seconds from a signal to the end of the process. `ends_at`: on
    the clock of `time.time`, when the job is to have ended; rank 0 asks for it `grace` seconds before.
    """

    def __init__(
        self, gate: Gate, group: dist.ProcessGroup | None, actions: Actions, *, grace: float, ends_at: float | None
    ) -> None:
        self._gate, self._group, self._actions, self._grace = gate, group, actions, grace
        self._rank = dist.get_rank(group) if group is not None else 0
        self._requests = _requests(group, self._rank, grace)
        self._stop_at = ends_at - grace if ends_at is not None and self._rank == 0 else None
        self._state = _State()
        self._wake, self._woken = socket.socketpair()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._keep)]
        self._code: int = ExitCode.STOPPED
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    @contextmanager
    def around(self) -> Iterator[Callable[[], None]]:
        """Around all training. Gives what is to be called after its last step: signals are ignored from there on.

        Neither that call nor an error gets past a stop that is under way.
        """
        self._start()
        try:
            yield self._over
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            self._close()

    def _start(self) -> None:
        self._wake.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, _nothing)
            signal.siginterrupt(number, False)  # what training's libraries call shall not fail with EINTR
        for thread in self._threads:
            thread.start()

    def _over(self) -> None:
        """Nothing is left to train. All ranks agree whether a request came before that; a stop never returns."""
        self._gate.end()
        self._ask(Request(Wish.DONE, "training is over"))
        self._state.wait_for(lambda: self._state.over or self._state.stopping)
        self._park()

    def _failed(self, error: BaseException) -> None:
        """The training thread has failed; what is under way still gets its time. After failed data all ranks save."""
        self._gate.end()
        if isinstance(error, DataError):
            self._state.set(failing=True)
            self._wanted(Request(Wish.FAIL, _line(error)), error.exit_code)
            self._nudge()
            self._state.wait_for(lambda: self._state.over)
            return
        self._state.wait_for(lambda: not self._state.busy or self._state.stopping, self._grace)
        self._park()
        if self._group is None:
            self._ask(Request(Wish.DONE, "training has failed"))

    def _park(self) -> None:
        while self._state.stopping:
            time.sleep(1)

    def _close(self) -> None:
        """Give the signals back."""
        self._state.set(over=True, closed=True)
        self._nudge()
        self._threads[0].join()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._wake.close()
        self._woken.close()

    def _nudge(self) -> None:
        """Let the listener look at its clocks."""
        with suppress(BlockingIOError):  # then there is something to wake it
            self._wake.send(bytes([WAKE]))

    def _listen(self) -> None:
        """The listener's thread: signals, and two clocks."""
        state = self._state
        while not state.closed:
            for number in self._heard():
                if number in SIGNALS:
                    self._signalled(signal.Signals(number))
            if self._stop_at is not None and time.time() >= self._stop_at:
                self._stop_at = None
                self._wanted(Request(Wish.STOP, "training.exit_after"))
            if state.deadline is not None and time.monotonic() >= state.deadline:
                self._late()

    def _heard(self) -> bytes:
        """The numbers of the signals that come before the next clock strikes."""
        self._woken.settimeout(self._seconds())  # not `select`, which takes no descriptor above 1023
        try:
            return self._woken.recv(4096)
        except (TimeoutError, BlockingIOError):
            return b""

    def _seconds(self) -> float | None:
        """Until the next clock strikes; None if none will."""
        deadline = self._state.deadline
        left = [deadline - time.monotonic()] if deadline is not None else []
        left += [self._stop_at - time.time()] if self._stop_at is not None else []
        return max(min(*left, LONGEST_SECONDS), 0) if left else None

    def _signalled(self, number: signal.Signals) -> None:
        now, first = time.monotonic(), self._state.signalled
        if SIGNALS[number] == Wish.STOP:
            if first is not None and now - first > ECHO_SECONDS:
                _say(logging.ERROR, "%s again: ending at once", number.name)
                self._leave(128 + number)
            if first is not None:
                return
            self._state.signalled = now
        self._wanted(Request(SIGNALS[number], number.name), 128 + number)

    def _wanted(self, request: Request, code: int = ExitCode.FAILED) -> None:
        """Ask all ranks for it. Without a store there are no others any more: a stop then ends at once."""
        state, stop = self._state, request.wish in ENDING
        if state.stopping or state.over:
            return
        state.set(busy=True, stopping=stop)
        if stop:
            state.deadline = time.monotonic() + self._grace
        try:
            if self._ask(request) == Wish.DONE:  # another rank was first to say so
                state.end()
        except (dist.DistError, RuntimeError) as error:
            _say(logging.ERROR, "%s: other ranks cannot be told, nothing is saved: %s", request.reason, _line(error))
            if stop:
                self._quit(code)
            state.set(busy=False)

    def _ask(self, request: Request) -> Wish:
        """Put a request into the order, unless an earlier one does for it; what it is met by."""
        number = self._state.number
        while not request.met_by(there := self._requests.write(number, request)):
            number += 1
        return there.wish

    def _keep(self) -> None:
        """The keeper's thread: one request after the other."""
        state = self._state
        while not state.over:
            try:
                request = self._requests.wait(state.number)
            except (dist.DistError, RuntimeError):  # the store has gone: nobody can ask any more
                state.set(over=True)
                return
            if request.wish == Wish.DONE:
                state.end()
                return
            self._meet(request)
            state.number += 1
            state.set(busy=False)

    def _meet(self, request: Request) -> None:
        """Save, and for a stop end the process: with what `Actions.end` says, or with 1 if nothing could be saved."""
        stop = request.wish in ENDING
        self._state.set(busy=True, stopping=stop)
        if stop:
            self._code = ENDING[request.wish]
            self._begin_stop(request)
        try:
            self._save(request)
        except Exception as error:  # whatever it is, this thread has to bring it to an end
            what = str(error) if isinstance(error, EspalierError) else f"{type(error).__name__}: {_line(error)}"
            _say(logging.ERROR, "%s: nothing is saved: %s", request.reason, what)
            if stop:
                self._quit(ExitCode.FAILED)
                return
        if stop:
            self._end(request)
            return
        self._gate.open()

    def _begin_stop(self, request: Request) -> None:
        state = self._state
        state.deadline = state.deadline or time.monotonic() + self._grace
        self._nudge()
        _say(logging.INFO, "%s: saving a checkpoint and ending, within %g s", request.reason, self._grace)

    def _save(self, request: Request) -> None:
        self._reached(1)
        if not self._gate.close(self._agree):
            raise EspalierError(f"the training thread has failed {self._actions.place()}")
        self._reached(2)
        self._actions.save(request)
        self._reached(3)

    def _end(self, request: Request) -> None:
        code = self._code
        try:
            code = self._actions.end(request)
            if witness := running():
                witness.close()
            self._agree(0)  # none leaves before all have saved: a launcher may end the others then
        except Exception as error:  # the checkpoint is there, which is what counts
            _say(logging.WARNING, "%s: %s", request.reason, _line(error))
        if request.wish == Wish.STOP:
            self._leave(code)
        self._quit(code)

    def _agree(self, number: int) -> int:
        """The largest number of all ranks."""
        return int(all_reduce_max(torch.tensor(number), self._group))

    def _reached(self, stage: int) -> None:
        self._state.stage = stage
        self._requests.reached(self._state.number, stage)

    def _late(self) -> None:
        """The grace is over. What was saved by then is saved."""
        if self._state.stage == len(STAGES) - 1:
            self._quit(self._code)
            return
        own = STAGES[self._state.stage]
        where = f", {self._actions.place()}" if self._state.stage == 1 else ""
        _say(logging.ERROR, "not saved within checkpoint.grace_seconds = %g: this rank %s%s", self._grace, own, where)
        if self._rank == 0:
            self._tell_of_others()
        self._quit(ExitCode.FAILED)

    def _tell_of_others(self) -> None:
        try:
            stages = self._requests.stages(self._state.number)
        except (dist.DistError, RuntimeError) as error:
            _say(logging.ERROR, "the store does not answer: %s", _line(error))
            return
        behind = [f"rank {rank} {STAGES[stage]}" for rank, stage in enumerate(stages) if stage == min(stages)]
        if behind:
            more = [f"and {len(behind) - LISTED} more"] if len(behind) > LISTED else []
            _say(logging.ERROR, "the last are: %s", ", ".join([*behind[:LISTED], *more]))

    def _quit(self, code: int) -> None:
        """End the process, or where the training thread has failed let that end it with its error."""
        if not self._state.failing:
            self._leave(code)
        self._state.end()

    def _leave(self, code: int) -> NoReturn:
        """End the process; its children first, since nobody will be there to do it."""
        for child in multiprocessing.active_children():
            child.terminate()
        self._actions.leave(code)


@dataclass
class _State:
    """What the three threads know of each other."""

    number: int = 0
    """Of the request that the keeper waits for or is with."""
    stage: int = 0
    """How far it is with that."""
    busy: bool = False
    """A request is on its way or being met."""
    stopping: bool = False
    """… and it is a stop, so that the process will end."""
    over: bool = False
    """No request is met any more."""
    failing: bool = False
    """This rank's training thread has an error to end with, and waits for the others' save."""
    closed: bool = False
    """Signals are no longer listened to."""
    signalled: float | None = None
    """When this rank first got a signal to stop, on the monotonic clock."""
    deadline: float | None = None
    """When a stop must be done, on the monotonic clock."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def set(
        self,
        *,
        busy: bool | None = None,
        stopping: bool = False,
        over: bool = False,
        failing: bool = False,
        closed: bool = False,
    ) -> None:
        """Change what is said; only `busy` is taken back here."""
        with self.changed:
            self.busy = self.busy if busy is None else busy
            self.stopping, self.over = self.stopping or stopping, self.over or over
            self.failing, self.closed = self.failing or failing, self.closed or closed
            self.changed.notify_all()

    def end(self) -> None:
        """Training was over before whatever has been asked for since: no stop is to come."""
        with self.changed:
            self.busy, self.stopping, self.over, self.deadline = False, False, True, None
            self.changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until it is so."""
        with self.changed:
            return self.changed.wait_for(predicate, seconds)


def _requests(group: dist.ProcessGroup | None, rank: int, seconds: float) -> Requests:
    witness = running()
    if group is None or witness is None:
        return OwnRequests()
    return SharedRequests(witness.store.underlying_store, rank, dist.get_world_size(group), seconds)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The Python side of a signal; the listener has the byte that the C side wrote."""


def _say(level: int, text: str, *values: object) -> None:
    """Log, but do not wait for whoever reads standard error: the training thread may hold its lock."""
    saying = threading.Thread(target=logger.log, args=(level, text, *values), daemon=True)
    saying.start()
    saying.join(SAYING_SECONDS)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
