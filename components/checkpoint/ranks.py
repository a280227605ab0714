"""Ranks: those that save or load together, and how they agree on what went wrong.

A checkpoint is whole on every rank or it does not exist, so a failure on one rank must stop all of them, at the same
place and with the same words; a rank that raised by itself would leave the others waiting in the next collective. Each
phase therefore runs through `everywhere` or `on_first`, which exchange error texts afterwards. The price is one small
collective a phase. `torch.distributed.checkpoint.save` does the same inside, but raises a BaseException that
holds a traceback of every rank.
"""

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from components.runtime.errors import CheckpointError

T = TypeVar("T")

_SPACE = "free space there, or lower checkpoint.keep_latest_k"
_WRITABLE = "give a folder that can be written to (for a job: job.dump_folder)"
_MEND = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOTDIR: _WRITABLE,
    errno.EEXIST: _WRITABLE,
}


class Ranks:
    """The ranks of a process group, or with None this process alone.

    Every method is collective: all ranks call it, in the same order. The group carries pickled objects, so it should be
    one of the CPU (gloo).
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.first = self.rank == 0

    def everywhere(self, fn: Callable[[], T], what: str = "") -> T:
        """Run `fn` on every rank; each gets its own result. Raises the same CheckpointError on all if any failed.

        `what` starts the message, as in "cannot save step-20".
        """
        result, failure = _attempt(fn)
        texts = self.all_gather("" if failure is None else describe(failure))
        if any(texts):
            raise CheckpointError(_join(what, texts)) from failure
        return result[0]

    def on_first(self, fn: Callable[[], T], what: str = "") -> T:
        """Run `fn` on rank 0; all get its result, or the same CheckpointError."""
        result, failure = _attempt(fn) if self.first else ([], None)
        answer = self._broadcast((result, "" if failure is None else describe(failure)))
        if answer[1]:
            raise CheckpointError(_join(what, [answer[1]])) from failure
        return answer[0][0]

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """The values of all ranks on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size if self.first else []
        dist.gather_object(value, values if self.first else None, group=self._group, group_dst=0)
        return values

    def scatter(self, values: list[T]) -> T:
        """Rank r gets `values[r]` of rank 0; what other ranks pass is not looked at."""
        if self.size == 1:
            return values[0]
        mine: list[T] = values[:1] or [None]  # pyrefly: ignore[bad-assignment]  # overwritten by the call
        dist.scatter_object_list(mine, values if self.first else None, group=self._group, group_src=0)
        return mine[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Element by element, whether any rank has it. All give as many; costs a byte each, whatever the number of
        ranks."""
        found = torch.tensor(flags, dtype=torch.uint8)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in found.tolist()]

    def _broadcast(self, value: T) -> T:
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]


def _attempt(fn: Callable[[], T]) -> tuple[list[T], Exception | None]:
    try:
        return [fn()], None
    except Exception as failure:  # agreed on by the caller, and raised there on all ranks
        return [], failure


def _join(what: str, texts: list[str]) -> str:
    if len(set(texts)) == 1:
        text = texts[0]
    else:
        text = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    return f"{what}: {text}" if what else text


def describe(failure: Exception) -> str:
    """A failure in one line: what, where, and for the common ones how to mend it."""
    if isinstance(failure, CheckpointError):
        return str(failure)
    failure = _system_error(failure) or failure
    if isinstance(failure, OSError):
        where = f" ('{failure.filename}')" if failure.filename else ""
        mend = _MEND.get(failure.errno or 0)
        return f"{failure.strerror or failure}{where}" + (f": {mend}" if mend else "")
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def _system_error(failure: BaseException | None) -> OSError | None:
    """The OSError behind a failure: torch's file writer raises a RuntimeError of its own on a full disk."""
    while failure is not None and not isinstance(failure, OSError):
        failure = failure.__cause__ or failure.__context__
    return failure
