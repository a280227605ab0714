"""When a collective does not end: which ranks did not come to it, and where they are instead.

Each rank of several has a thread, the witness, that waits on a connection of its own to the job's store until it is
asked. A rank whose collective timed out asks the others; each then answers with its step, its phase, the line its main
thread stands at, and the collectives that it last entered, and writes its flight recording. So a rank that hangs in its
own code tells where, and one that is stopped or dead is known by its silence, and by what the others did without it.

One rank asks and tells, the first to come, and it prints at once: a launcher that has to end a stopped process first
would speak half a minute later. The others wait for it, since the launcher ends all ranks as soon as one has ended. A
rank that only finds its connections closed lets those speak who know why they were: a rank that timed out, or failed.

It costs a thread and an idle connection per rank, and per collective what torch's flight recorder costs. Rejected:
heartbeats, which cost traffic all the time and say only that a rank lives; and gloo's own message, which names a port.
NCCL's failures do not reach Python: its watchdog ends the process, names the collective and writes the same recordings.
"""

import io
import json
import os
import pickle
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from components.runtime.errors import CommunicationError, EspalierError

GRACE_SECONDS = 0.6
"""How long ranks get to answer."""
SPEAKER_SECONDS = 2.0
"""How long the others wait for the rank that tells."""
CLOSED_SECONDS = 1.0
"""How long a rank whose connections were closed waits for another to say why."""
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


@dataclass
class Standing:
    """How far this rank is; the training loop writes it, the witness reads it."""

    step: int = 0
    """The step that it is in; 0 at start-up."""
    phase: str = "start-up"
    """The part of the step: data, forward/backward, optimizer, validation, save; start-up, load and end are in none."""

    def __str__(self) -> str:
        return f"in step {self.step}, {self.phase}" if self.step else f"at {self.phase}"


class Answer(TypedDict):
    """What a rank says of itself."""

    standing: str
    """`Standing` in words."""
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
        self.standing = Standing()
        self.failed: str | None = None
        self._closed = threading.Event()
        # A connection for itself: a wait would lock out everybody else's.
        own: dist.Store = store.clone()  # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
        self._own = dist.PrefixStore("witness", own)
        self._main = threading.main_thread().ident or 0
        self.store.set(f"home/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")

    def run(self) -> None:
        """Wait for the question, answer it, and stay until closed, so as to be found (`running`)."""
        with suppress(dist.DistError, RuntimeError, OSError):  # the store has gone, and with it whoever could ask
            self._own.wait([f"ask/{self.rank}"], PATIENCE)
            if self._own.get(f"ask/{self.rank}") == b"where":
                self.answer(self._own)
        self._closed.wait()

    def answer(self, store: dist.Store) -> None:
        """Say where this rank is, and write its flight recording."""
        where = _place(sys._current_frames().get(self._main))  # the only way to see another thread's frames
        answer: Answer = {
            "standing": str(self.standing),
            "where": where,
            "failed": self.failed,
            "entered": _latest(),
        }
        store.set(f"answer/{self.rank}", json.dumps(answer))
        self.record()

    def record(self) -> None:
        """Write the flight recording."""
        _write_recording(self.path)

    def ask(self, ranks: Sequence[int]) -> dict[int, Answer]:
        """What other ranks say of themselves; those that are silent are left out."""
        for rank in ranks:
            self.store.set(f"ask/{rank}", "where")
        silent, end = set(ranks), time.monotonic() + GRACE_SECONDS
        while silent and time.monotonic() < end:  # asking again is quieter than to wait: torch prints a C++ warning
            silent = {rank for rank in silent if not self.store.check([f"answer/{rank}"])}
            time.sleep(0.02)
        return {rank: json.loads(self.store.get(f"answer/{rank}")) for rank in ranks if rank not in silent}

    def home(self, rank: int) -> str:
        """Host and process of a rank."""
        return self.store.get(f"home/{rank}").decode() if self.store.check([f"home/{rank}"]) else "host n/a"

    def store_answers(self) -> bool:
        """Whether the store does; it may be in a process that is stopped, and no call of it ends then."""
        asking = threading.Thread(target=self.store.check, args=([""],), daemon=True)
        asking.start()
        asking.join(GRACE_SECONDS)
        return not asking.is_alive()

    def begins(self) -> bool:
        """Whether this rank is the first that comes to tell of a failure."""
        return self.store.compare_set("speaker", "", str(self.rank)) == str(self.rank).encode()

    def hear(self, seconds: float) -> bool:
        """Whether another rank begins to tell within `seconds`; returns when it has ended, or waited for too long."""
        return self._comes("speaker", seconds) and (self._comes("told", SPEAKER_SECONDS) or True)

    def _comes(self, key: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with suppress(dist.DistError, RuntimeError):  # the rank that hosts the store has ended before
            self.store.set(f"ask/{self.rank}", "end")
            self.join(timeout=1)


def running() -> Witness | None:
    """This process's witness; None for a job of one rank. The thread itself is what remembers it."""
    return next((thread for thread in threading.enumerate() if isinstance(thread, Witness)), None)


def standing() -> Standing:
    """What this rank's witness reads, for the loop to write; of a job of one rank nobody reads it."""
    witness = running()
    return witness.standing if witness else Standing()


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
        if isinstance(error, EspalierError) or not _of_communication(error):
            witness.failed = _failure(error)
            raise
        raise _explained(witness, error) from error


def _explained(witness: Witness, error: Exception) -> CommunicationError:
    """The error that says what happened; one rank of those that timed out prints it, too."""
    failure, timed_out = _failure(error), any(word in str(error).lower() for word in ("timed out", "timeout"))
    if not witness.store_answers():
        return CommunicationError(
            f"communication has failed {witness.standing} ({failure}): the process that hosts the store of the ranks,"
            f" rank 0 or its launcher on {os.environ.get('MASTER_ADDR', 'n/a')}, does not answer"
        )
    try:
        if not (timed_out and witness.begins()):
            if witness.hear(0 if timed_out else CLOSED_SECONDS):
                witness.record()
                return CommunicationError(f"communication has failed {witness.standing} ({failure})", told=True)
            return CommunicationError(_explain(witness, failure))
        text = _explain(witness, failure)
        print(f"error: [rank {witness.rank}] {text}", file=sys.stderr, flush=True)
        witness.store.set("told", "")
        return CommunicationError(text, told=True)
    except (dist.DistError, RuntimeError):  # the store has gone, with the rank or the launcher that hosted it
        witness.record()
        return CommunicationError(f"communication has failed {witness.standing} ({failure}); no rank can be asked")


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
    witness.record()
    here = str(witness.standing)
    silence = f"{SILENT}; it is {here} or before"
    silent = {rank: silence for rank in others if rank not in answers}
    recorded = f"; recordings of the ranks: {witness.path.parent}" if entered else ""
    if found := stalled(entered, apart, answers):
        (name, number, operation), missing = found
        members = ", ".join(map(str, groups[name]))
        what = f"{operation} #{number} over {_title(name)} = ranks ({members}) {here} has failed"
        return f"{what}: {_listed(silent | missing, witness.home)} ({failure}){recorded}"
    stand = silent | {rank: _stands(answer) for rank, answer in answers.items()}
    return f"communication has failed {here} ({failure}): {_listed(stand, witness.home)}{recorded}"


def stalled(
    entered: Sequence[Entry], groups: Mapping[str, Sequence[int]], answers: Mapping[int, Answer]
) -> tuple[Entry, dict[int, str]] | None:
    """The first collective of this rank that not all others entered, and what each of those does instead.

    `entered`: this rank's collectives, in order. `groups`: the other ranks of each of its groups. Of ranks that are
    silent nobody knows what they entered: they are missed in this rank's last one. None if all came.
    """
    for entry in entered:
        members = [rank for rank in groups.get(entry[0], ()) if rank in answers]
        if missing := {rank: why for rank in members if (why := _missing(answers[rank], *entry))}:
            return entry, missing
    for entry in entered[-1:]:
        if set(groups.get(entry[0], ())) - {*answers}:
            return entry, {}
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
    if answer["failed"]:
        return f"failed {answer['standing']}: {answer['failed']}"
    return f"is {answer['standing']}, at {answer['where']}"


def _listed(told: Mapping[int, str], home: Callable[[int], str]) -> str:
    lines = [f"rank {rank} ({home(rank)}) {text}" for rank, text in list(told.items())[:LISTED]]
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
