"""Whole jobs that are sent signals: `interrupt(2, folder, arguments, shots)` runs the entry point on two real ranks.

A rank that is stopped ends its own process, so `tests.ranks` lends only its warm process, and that one forks the ranks,
signals them and waits. What a rank says goes into a file.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, meeting_point

JOB = (
    *TINY,
    "--experimental.custom_import=tests.reliability.holding",
    "--training.global_batch_size=4",
    "--training.local_batch_size=2",
    "--training.steps=6",
    "--data.document_mask",
    "--checkpoint.enable",
    "--checkpoint.grace_seconds=20",
)
"""Six steps, saved at the end and whenever it is told to."""


@dataclass(frozen=True)
class Shot:
    """A signal, once all of the marks are there and so many seconds have passed.

    `tree`: to the ranks' child processes too, as schedulers do.
    """

    number: signal.Signals
    ranks: tuple[int, ...]
    marks: tuple[str, ...] = ()
    delay: float = 0.05
    tree: bool = False


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    """Of its process; negative for a signal."""
    err: str
    seconds: float
    """Since the last shot."""
    children: tuple[int, ...]
    """Process ids of its children at the last shot."""


def interrupt(
    ranks: int, folder: Path, arguments: Sequence[str], shots: Sequence[Shot] = (), **environ: str
) -> list[Ended]:
    """Run the job on that many ranks and shoot; how each ended. HOLD (see `holding`) leaves its marks in the folder."""
    folder.mkdir(exist_ok=True)
    variables = {**meeting_point(), "HOLD_MARK": f"{folder}/held", **environ}
    argv = [*JOB, f"--job.dump_folder={folder}", *arguments]
    [ended] = run_ranks(1, _supervise, ranks, folder, argv, shots, variables, backend=None, timeout=90)
    return ended


def _supervise(
    ranks: int, folder: Path, argv: list[str], shots: Sequence[Shot], environ: Mapping[str, str]
) -> list[Ended]:
    os.environ.update(environ, WORLD_SIZE=str(ranks))
    pids = [_fork(rank, folder, argv) for rank in range(ranks)]
    children: list[tuple[int, ...]] = [()] * ranks
    for shot in shots:
        children = _shoot(shot, pids, folder)
    begin, ended, deadline = time.monotonic(), {}, time.monotonic() + 60
    while len(ended) < ranks:
        for rank, pid in enumerate(pids):
            if rank in ended:
                continue
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                text = (folder / f"{rank}.err").read_text()
                ended[rank] = Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - begin, children[rank])
        time.sleep(0.01)
    return [ended[rank] for rank in range(ranks)]


def _shoot(shot: Shot, pids: Sequence[int], folder: Path) -> list[tuple[int, ...]]:
    deadline = time.monotonic() + 40
    while not all((folder / mark).exists() for mark in shot.marks) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(shot.delay)
    children = [tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())) for pid in pids]
    for rank in shot.ranks:
        for pid in (*children[rank], pids[rank]) if shot.tree else (pids[rank],):
            os.kill(pid, shot.number)
    return children


def _fork(rank: int, folder: Path, argv: list[str]) -> int:
    pid = os.fork()
    if not pid:
        _rank(rank, folder, argv)
    return pid


def _rank(rank: int, folder: Path, argv: list[str]) -> NoReturn:
    from trainer.command import leave, main

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    try:
        code = main(argv, os.environ)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ["WORLD_SIZE"]) > 1:
        leave(code)
    os._exit(code)
