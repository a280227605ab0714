"""Processes that may be killed: `run(case)` forks a warm process, arms `harness_calls.c` in it, and says how it ended.

A server process, started once per test session with `harness_calls.c` loaded into it, has imported what a job needs
and only forks; so a job that is killed and comes back takes about a second. `tests.ranks` does the same for ranks that
live, and takes a rank that dies for a failed test. What a process did until it died stands in a file that both have
mapped: each call below the folder of the checkpoints, the part of the commit protocol it belongs to, and whether it
returned.
"""

import atexit
import ctypes
import functools
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from tests.ranks import PRELOADED, Server, redirect, serve

SOURCE = Path(__file__).with_name("harness_calls.c")
RECORDS, NAME = 16384, 120


class Op(IntEnum):
    """What a call does; the order is that of harness_calls.c."""

    OPEN = 0
    CREATE = 1
    WRITE = 2
    FSYNC = 3
    CLOSE = 4
    RENAME = 5
    MKDIR = 6
    UNLINK = 7
    RMDIR = 8
    TRUNCATE = 9
    OPENDIR = 10
    STAT = 11


class Mode(IntEnum):
    """What happens at the chosen call."""

    WATCH = 0
    FAIL = 1
    FAIL_ON = 2
    """Every later call that takes space or changes a name fails too: a full disk, a dead one."""
    KILL_BEFORE = 3
    KILL_WITHIN = 4
    KILL_AFTER = 5


class Phase(IntEnum):
    """Part of the commit protocol."""

    OTHER = 0
    WRITE = 1
    RENAME = 2
    DELETE = 3


class _Record(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("op", "phase", "result", "thread")] + [
        ("name", ctypes.c_char * NAME),
        ("other", ctypes.c_char * NAME),
    ]


class _Shared(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("mode", "error", "phase", "permille")),
        *((name, ctypes.c_int64) for name in ("target", "count", "in_phase")),
        *((name, ctypes.c_int32) for name in ("now", "unused")),
        ("root", ctypes.c_char * 512),
        ("records", _Record * RECORDS),
    ]


class Call(NamedTuple):
    """One call below the watched folder."""

    op: Op
    phase: Phase
    name: str
    other: str
    """The new name, of a rename."""
    error: int | None
    """0: it returned; an errno; None: the process died in it."""


@dataclass(frozen=True)
class Blow:
    """What a process meets at call number `target`, counted from 0, of those in `phase` (all calls if None)."""

    mode: Mode = Mode.WATCH
    target: int = -1
    phase: Phase | None = None
    error: int = 0
    permille: int = 500
    """How much of a write is done when it is killed within."""


@dataclass(frozen=True)
class Case:
    """One process: `fn(*args)` with what it meets. `kill_after` seconds it is killed from outside."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    root: Path
    """The watched folder; it need not be there yet."""
    blow: Blow = field(default_factory=Blow)
    kill_after: float | None = None
    timeout: float = 60


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; −9: killed."""
    value: Any
    """What fn returned; None if it did not."""
    log: str
    """Standard output and error."""
    calls: list[Call]
    seconds: float
    phase: Phase
    """Where it was when it ended."""


@functools.cache
def library() -> Path:
    """harness_calls.c, compiled. The test is skipped where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs Linux and a C compiler: calls are watched by a preloaded library")
    target = Path(tempfile.mkdtemp(prefix="calls-")) / "calls.so"
    atexit.register(shutil.rmtree, target.parent, ignore_errors=True)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", target, SOURCE, "-ldl"], check=True)
    return target


def run(case: Case) -> Ended:
    """Run one process to its end."""
    with tempfile.TemporaryDirectory(prefix="case-") as folder:
        _write_order(Path(folder) / "shared", case)
        call = pickle.dumps((case.fn, case.args))
        code, seconds = _server().ask((folder, call, case.kill_after, case.timeout))
        shared = _read_shared(Path(folder) / "shared")
        calls = [_call(shared.records[i]) for i in range(min(shared.count, RECORDS))]
        result = Path(folder) / "result"
        value = pickle.loads(result.read_bytes()) if result.exists() else None
        log = (Path(folder) / "log").read_text(errors="replace")
        return Ended(code, value, log, calls, seconds, Phase(calls[-1].phase if _inside(calls) else shared.now))


def _inside(calls: list[Call]) -> bool:
    return bool(calls) and calls[-1].error is None


def _write_order(path: Path, case: Case) -> None:
    order = _Shared(
        mode=case.blow.mode,
        error=case.blow.error,
        phase=-1 if case.blow.phase is None else case.blow.phase,
        permille=case.blow.permille,
        target=case.blow.target,
        root=str(case.root.resolve()).encode(),
    )
    header = _Shared.records.offset
    with path.open("wb") as file:
        file.write(bytes(order)[:header])
        file.truncate(ctypes.sizeof(_Shared))


def _read_shared(path: Path) -> Any:
    return _Shared.from_buffer_copy(path.read_bytes())


def _call(record: Any) -> Call:
    error = None if record.result == -1 else record.result
    name, other = (text.decode(errors="replace") for text in (record.name, record.other))
    return Call(Op(record.op), Phase(record.phase), name, other, error)


def committed(calls: list[Call]) -> list[int]:
    """Steps whose folder had got its name, in order."""
    done = [c for c in calls if c.op == Op.RENAME and c.other.startswith("step-") and c.name.startswith(".tmp-")]
    return [int(call.other.removeprefix("step-")) for call in done if call.error == 0]


@functools.cache
def _server() -> Server:
    return Server("tests.reliability.harness", LD_PRELOAD=str(library()))


def _run(order: tuple[str, bytes, float | None, float]) -> tuple[int, float]:
    """Fork one process and wait for it; its exit code and seconds."""
    folder, call, kill_after, timeout = order
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(Path(folder), call)
    code = _wait(pid, started + (timeout if kill_after is None else kill_after))
    return code, time.monotonic() - started


def _wait(pid: int, deadline: float) -> int:
    """Wait for a process, and kill it at the deadline; its exit code."""
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(folder: Path, call: bytes) -> NoReturn:
    redirect(folder / "log")
    code = 1
    try:
        fn, args = pickle.loads(call)
        if ctypes.CDLL(None).calls_watch(os.fsencode(folder / "shared")):
            raise RuntimeError("harness_calls.c could not map its file")
        value = fn(*args)
        (folder / "result").write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _main() -> None:
    serve((*PRELOADED, "tests.trainer.tiny", "components.checkpoint.checkpointer"), _run)


if __name__ == "__main__":
    # Under `-m` this file is `__main__`; requests name it `tests.reliability.harness`, so serve from that module.
    importlib.import_module("tests.reliability.harness")._main()
