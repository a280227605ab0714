"""When a collective does not end: which ranks did not come to it, and where they are instead.

Each rank of several has a thread, the witness, that waits on a connection of its own to the job's store until it is
asked. A rank whose communication failed asks the others; each then writes its flight recording and answers with its
step, the line its main thread stands at, and the collectives that it last entered. So a rank that hangs in its own code
tells where, and one that is dead is known by its silence.

It costs a thread and an idle connection per rank, and per collective what torch's flight recorder costs. Rejected:
heartbeats, which cost traffic all the time and say only that a rank lives; and gloo's own message, which names a port.
NCCL's failures do not reach Python: its watchdog ends the process, names the collective and writes the same recordings.
"""

import io
import json
import pickle
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from components.runtime.errors import CommunicationError, EspalierError

GRACE_SECONDS = 5.0
"""How long ranks get to answer."""
LATEST = 50
"""Collectives of each group that an answer holds."""
LISTED = 8
"""Ranks that a message tells of one by one."""
PATIENCE = timedelta(days=365)
FOREIGN = ("site-packages", sysconfig.get_paths()["stdlib"], "<")
"""Parts of file names that are not of this project or of the user."""


SILENT = "does not answer"
Entry = tuple[str, int, str]
"""A collective: the group's name, its number there, its operation."""


class Answer(TypedDict):
    """What a rank says of itself."""

    step: int
    """The step that it is in; 0 at start-up."""
    where: str
    """The innermost line of our or the user's code that its main thread is in."""
    failed: str | None
    """How it failed, if it has."""
    entered: dict[str, list[tuple[int, str]]]
    """Group → the latest collectives that it entered there: number and operation, in order."""


class Witness(threading.Thread):
    """Answers for this rank. `path` is where its flight recording goes; `store` is shared by all ranks."""

    def __init__(self, rank: int, store: dist.Store, path: Path) -> None:
        super().__init__(name="witness", daemon=True)
        self.rank, self.path, self.store = rank, path, dist.PrefixStore("witness", store)
        self.step: Callable[[], int] = lambda: 0
        self.failed: str | None = None
        # A connection for itself: a wait would lock out everybody else's.
        own: dist.Store = store.clone()  # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
        self._own = dist.PrefixStore("witness", own)
        self._main = threading.main_thread().ident or 0

    def run(self) -> None:
        """Wait for the question, answer it, end."""
        try:
            self._own.wait([f"ask/{self.rank}"], PATIENCE)
            if self._own.get(f"ask/{self.rank}") == b"where":
                self.answer(self._own)
        except (dist.DistError, RuntimeError, OSError):  # the store has gone, and with it whoever could ask
            return

    def answer(self, store: dist.Store) -> None:
        """Say where this rank is, and write its flight recording."""
        where = _place(sys._current_frames().get(self._main))  # the only way to see another thread's frames
        answer: Answer = {"step": self.step(), "where": where, "failed": self.failed, "entered": _latest()}
        store.set(f"answer/{self.rank}", json.dumps(answer))
        _write_recording(self.path)

    def ask(self, ranks: Sequence[int]) -> dict[int, Answer]:
        """What other ranks say of themselves; those that are silent are left out."""
        for rank in ranks:
            self.store.set(f"ask/{rank}", "where")
        silent, end = set(ranks), time.monotonic() + GRACE_SECONDS
        while silent and time.monotonic() < end:  # asking again is quieter than to wait: torch prints a C++ warning
            silent = {rank for rank in silent if not self.store.check([f"answer/{rank}"])}
            time.sleep(0.05)
        return {rank: json.loads(self.store.get(f"answer/{rank}")) for rank in ranks if rank not in silent}

    def close(self) -> None:
        """End the thread."""
        try:
            self.store.set(f"ask/{self.rank}", "end")
        except (dist.DistError, RuntimeError):  # the rank that hosts the store has ended before
            return
        self.join(timeout=1)


def running() -> Witness | None:
    """This process's witness; None for a job of one rank. The thread itself is what remembers it."""
    return next((thread for thread in threading.enumerate() if isinstance(thread, Witness)), None)


def tell_step(step: Callable[[], int]) -> None:
    """Let the witness say which step this rank is in."""
    if witness := running():
        witness.step = step


@contextmanager
def explained() -> Iterator[None]:
    """Around all work of a rank: raises CommunicationError, with who and where, for communication that failed.

    Other errors pass; the witness keeps them for ranks that will ask why this one does not come.
    """
    try:
        yield
    except Exception as error:
        if (witness := running()) is None:
            raise
        failure = _failure(error)
        if isinstance(error, EspalierError) or not _of_communication(error):
            witness.failed = failure
            raise
        raise CommunicationError(_explain(witness, failure)) from error


def _of_communication(error: Exception) -> bool:
    """Whether a collective raised this. Gloo has no type of its own: its errors are told from others by their words."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Application timeout caused pair closure", "Connection closed by peer")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def _failure(error: Exception) -> str:
    text = str(error).partition("\n")[0].partition("] ")
    return f"{type(error).__name__}: {text[2] if text[0].startswith('[/') else ''.join(text)}".partition(". This is")[0]


def _explain(witness: Witness, failure: str) -> str:
    """Ask all ranks, and say it in a line."""
    entered, groups = _in_order(), _groups()
    others = sorted({rank for members in groups.values() for rank in members} - {witness.rank})
    apart = {name: [rank for rank in members if rank != witness.rank] for name, members in groups.items()}
    answers = witness.ask(others)
    witness.answer(witness.store)
    step = f"in step {witness.step()}" if witness.step() else "at start-up"
    recorded = f"; recordings of the ranks: {witness.path.parent}" if entered else ""
    if found := stalled(entered, apart, answers):
        (name, number, operation), missing = found
        members = ", ".join(map(str, groups[name]))
        what = f"{operation} #{number} over {_title(name)} = ranks ({members}) {step} has failed"
        return f"{what}: {_listed(missing)} ({failure}){recorded}"
    stand = {rank: _stands(answers[rank]) if rank in answers else SILENT for rank in others}
    return f"communication has failed {step} ({failure}): {_listed(stand)}{recorded}"


def stalled(
    entered: Sequence[Entry], groups: Mapping[str, Sequence[int]], answers: Mapping[int, Answer]
) -> tuple[Entry, dict[int, str]] | None:
    """The first collective of this rank that not all others entered, and what each of those does instead.

    `entered`: this rank's collectives, in order. `groups`: the other ranks of each of its groups. Of ranks that are
    silent nobody knows what they entered: they are looked for in this rank's last one. None if all came.
    """
    for entry in entered:
        members = [rank for rank in groups.get(entry[0], ()) if rank in answers]
        if missing := {rank: why for rank in members if (why := _missing(answers[rank], *entry))}:
            return entry, missing
    for entry in entered[-1:]:
        if silent := sorted(set(groups.get(entry[0], ())) - {*answers}):
            return entry, dict.fromkeys(silent, SILENT)
    return None


def _missing(answer: Answer, group: str, number: int, operation: str) -> str | None:
    """Why a rank did not take part in a collective; None if it did."""
    entered = answer["entered"].get(group, [])
    if not entered or entered[-1][0] < number:
        last = f", after {entered[-1][1]} #{entered[-1][0]}" if entered else ""
        return f"has not reached it; it {_stands(answer)}{last}"
    other = next((name for seen, name in entered if seen == number), operation)
    return None if other == operation else f"has entered {other} #{number} instead; it {_stands(answer)}"


def _stands(answer: Answer) -> str:
    step = f"in step {answer['step']}" if answer["step"] else "at start-up"
    return f"failed {step}: {answer['failed']}" if answer["failed"] else f"is {step}, at {answer['where']}"


def _listed(told: Mapping[int, str]) -> str:
    lines = [f"rank {rank} {text}" for rank, text in list(told.items())[:LISTED]]
    return "; ".join([*lines, *([f"and {len(told) - LISTED} more ranks"] if len(told) > LISTED else [])])


def _place(frame: FrameType | None) -> str:
    """`file:line in function` of the innermost frame that is not a library's."""
    innermost = frame
    while frame is not None and any(part in frame.f_code.co_filename for part in FOREIGN):
        frame = frame.f_back
    found = frame or innermost
    if found is None:
        return "no line: its main thread has ended"
    name = Path(found.f_code.co_filename)
    home = Path(__file__).resolve().parents[2]
    shown = name.relative_to(home) if name.is_relative_to(home) else name
    return f"{shown}:{found.f_lineno} in {found.f_code.co_name}"


def _in_order() -> list[Entry]:
    """Group, number and operation of the latest collectives of this rank, in the order it entered them."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # torch has no public name for it
    entries: list[dict[str, Any]] = json.loads(dump())["entries"] if dump else []
    return [
        (e["process_group"][0], e["collective_seq_id"], e["profiling_name"].partition(":")[2])
        for e in entries
        if not e["is_p2p"]
    ]


def _latest() -> dict[str, list[tuple[int, str]]]:
    """The latest collectives of this rank by group."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name, number, operation in _in_order():
        found.setdefault(name, []).append((number, operation))
    return {name: entered[-LATEST:] for name, entered in found.items()}


def _groups() -> dict[str, list[int]]:
    """The ranks of each of this rank's groups, by the name that the recorder has for it. Torch has no public list."""
    return {
        name: dist.get_process_group_ranks(group)
        for group, name in distributed_c10d._world.pg_names.items()
        if dist.get_backend(group) != dist.Backend.FAKE
    }


def _title(name: str) -> str:
    """What a group is called: its dimension of the mesh, or all ranks."""
    for group, known in distributed_c10d._world.pg_names.items():
        if known == name:
            return "all" if group is dist.group.WORLD else group.group_desc.removeprefix("mesh_")
    return name


class _Plain(pickle.Unpickler):
    """Reads containers, texts and numbers: torch's recording in full, of which its JSON form lacks the stacks."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a recording holds no {module}.{name}")


def _write_recording(path: Path) -> None:
    """torch's own format, for its analyzer (`torchfrtrace`); nothing if nothing is recorded."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if dump is None or not _in_order():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    recording = _Plain(io.BytesIO(dump())).load()
    recording["pg_config"] = {  # gloo leaves it empty, and the analyzer needs it
        name: {"name": name, "desc": _title(name), "ranks": str(ranks)} for name, ranks in _groups().items()
    }
    path.write_bytes(pickle.dumps(recording))
