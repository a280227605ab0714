"""Requests: what ranks ask of each other out of turn, in one order for all.

The requests of a job are numbered; who wants something writes it under the next free number, and every rank takes them
one by one. So all ranks do the same, whichever of them a signal came to. One rank keeps them to itself; several use the
job's store, over connections of their own: a wait would lock out everybody else's, and training's may be held up for
long. Rejected: an all-reduce of flags at each step, which a rank comes to only when its step is done.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Protocol

import torch.distributed as dist

PATIENCE = timedelta(days=365)


class Wish(StrEnum):
    """What is asked for."""

    SAVE = "save"
    """Save a checkpoint and go on."""
    STOP = "stop"
    """Save a checkpoint and end."""
    FAIL = "fail"
    """Save a checkpoint and end, since a rank cannot go on; that one ends with an error of its own."""
    DONE = "done"
    """Nothing any more: training is over."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and why."""

    wish: Wish
    reason: str

    def met_by(self, other: "Request") -> bool:
        """Whether nothing is left to ask for once the other one is met."""
        return other.wish in (self.wish, Wish.STOP, Wish.FAIL, Wish.DONE)


class Requests(Protocol):
    """The numbered requests of a job, and how far the ranks are with them."""

    def write(self, number: int, request: Request) -> Request:
        """Make this the request of that number, unless it has one; the request that it has then."""
        ...

    def wait(self, number: int) -> Request:
        """Wait for the request of that number."""
        ...

    def reached(self, number: int, stage: int) -> None:
        """Tell that this rank has come to a stage of a request, counted from 1."""
        ...

    def stages(self, number: int) -> Sequence[int]:
        """The stage of each rank; 0 if nothing was heard of it."""
        ...


class OwnRequests:
    """Those of a job of one rank."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._written: dict[int, Request] = {}

    def write(self, number: int, request: Request) -> Request:
        """See `Requests`."""
        with self._changed:
            self._changed.notify_all()
            return self._written.setdefault(number, request)

    def wait(self, number: int) -> Request:
        """See `Requests`."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._written)
            return self._written[number]

    def reached(self, number: int, stage: int) -> None:
        """Nobody else wants to know."""

    def stages(self, number: int) -> Sequence[int]:
        """Nothing to compare with."""
        return ()


class SharedRequests:
    """Those of several ranks, in a store that all of them reach.

    `seconds`: how long one waits for the store itself. All methods raise what torch does when the store has gone: a
    DistError or a RuntimeError.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, seconds: float) -> None:
        self._rank, self._ranks = rank, ranks
        self._waiting, self._asking = _connect(store), _connect(store)
        self._asking.set_timeout(timedelta(seconds=seconds))

    def write(self, number: int, request: Request) -> Request:
        """See `Requests`."""
        return _read(self._asking.compare_set(f"{number}", "", f"{request.wish} {request.reason}"))

    def wait(self, number: int) -> Request:
        """See `Requests`."""
        self._waiting.wait([f"{number}"], PATIENCE)
        return _read(self._waiting.get(f"{number}"))

    def reached(self, number: int, stage: int) -> None:
        """See `Requests`."""
        self._waiting.set(f"{number}/{self._rank}", str(stage))

    def stages(self, number: int) -> Sequence[int]:
        """See `Requests`."""
        keys = [f"{number}/{rank}" for rank in range(self._ranks)]
        return [int(self._asking.get(key)) if self._asking.check([key]) else 0 for key in keys]


def _connect(store: dist.Store) -> dist.Store:
    own: dist.Store = store.clone()  # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
    return dist.PrefixStore("interruption", own)


def _read(text: bytes) -> Request:
    wish, _, reason = text.decode().partition(" ")
    return Request(Wish(wish), reason)
