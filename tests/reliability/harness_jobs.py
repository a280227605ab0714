"""The job that is killed again and again, and what must hold whenever it has been."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.manifest import MANIFEST
from components.checkpoint.tensors import INDEX, parse_index
from tests.trainer.runs import TINY
from trainer.command import main

SAVING = (
    *TINY,
    "--training.global_batch_size=2",
    "--training.local_batch_size=2",
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--checkpoint.keep_latest_k=2",
)
"""The tiny job, saved after every step."""
FOREIGN = {
    "notes.txt": "mine",
    "step-05/x": "not a name of ours",
    "step-1.bak/x": "someone's copy",
    ".tmp-step-3-notes/x": "nobody's but its owner's",
}
"""Files in the folder of the checkpoints that Espalier did not write, and must leave alone."""


def job(argv: list[str]) -> int:
    """A whole job; its exit code."""
    return main(argv, os.environ)


def put_foreign(root: Path) -> None:
    for name, text in FOREIGN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def store(root: Path) -> Checkpointer:
    return Checkpointer(root, keep_latest_k=0, group=None)


def saved_steps(root: Path) -> list[int]:
    """Steps whose folder claims to be a checkpoint: it has the name, and a manifest."""
    return sorted(
        int(path.parent.name[5:]) for path in root.glob(f"step-*/{MANIFEST}") if path.parent.name[5:].isdigit()
    )


def load_all(root: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that a checkpoint holds, by the way that a resume takes: verified, then read."""
    run = store(root)
    sizes = {entry.name: entry.size for entry in run.read_manifest(step).files}
    index = parse_index((root / f"step-{step}" / INDEX).read_bytes(), sizes)
    tensors = {name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in index.items()}
    return tensors, run.load(step, tensors, job=None)


def check_folder(root: Path, newest: int | None) -> None:
    """What must hold after a kill: every checkpoint loads, the latest is the newest that was committed."""
    for step in saved_steps(root):
        assert store(root).verify(step) == []
        _, state = load_all(root, step)
        assert state["train_state"]["step"] == step
    assert store(root).latest() == newest
    for name, text in FOREIGN.items():
        assert (root / name).read_text() == text


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
