"""Whole jobs for tests: `train(2, "--training.steps=3", ...)` runs the entry point on two real ranks, forked warm."""

import contextlib
import io
import json
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = (
    "--training.dataset=c4_test",
    "--training.seq_len=24",
    "--training.local_batch_size=1",
    "--training.global_batch_size=12",
    "--training.steps=3",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.eps=1e-5",
    "--activation_checkpoint.mode=none",
    "--metrics.log_freq=1",
    "--debug.seed=7",
    f"--experimental.custom_import={__package__}.tiny",
    "--model.name=tiny_llama",
    "--model.flavor=untied",
)
"""A job that takes a second: a Llama of two layers on the small corpus, twelve rows a step."""


@dataclass(frozen=True)
class Outcome:
    """What one rank's process would have left behind."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    """One below those that systems give to connections, so that none takes it before a job listens on it."""
    while True:
        port = random.randrange(15000, 32000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def call(argv: list[str], environ: dict[str, str]) -> Outcome:
    """The entry point in this process, its output caught."""
    from trainer.command import main

    os.environ.update(environ)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv, os.environ)
    return Outcome(code, out.getvalue(), err.getvalue())


def meeting_point() -> dict[str, str]:
    """Variables for ranks that make their own process group; on the CPU unless ESPALIER_DEVICE says otherwise."""
    device = os.environ.get("ESPALIER_DEVICE", "cpu")
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ESPALIER_DEVICE": device}


def launch(ranks: int, folder: Path, *arguments: str, timeout: float = 120) -> list[Outcome]:
    """Run the tiny job on that many ranks, with these arguments on top."""
    environ = meeting_point()
    argv = [*TINY, f"--job.dump_folder={folder}", *arguments]
    return run_ranks(ranks, call, argv, environ, backend=None, timeout=timeout)


def train(ranks: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the tiny job, which must succeed; the records of its metrics.jsonl."""
    outcomes = launch(ranks, folder, *arguments)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    return records(folder)


def records(folder: Path) -> list[dict[str, Any]]:
    """The step records of a run, in order."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "event" not in record]


def facts(record: dict[str, Any]) -> dict[str, float]:
    """What must not depend on the layout."""
    return {key: record[key] for key in ("loss", "max_loss", "grad_norm", "tokens")}
