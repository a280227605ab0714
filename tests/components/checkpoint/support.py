"""A small job to checkpoint, and the ways to damage what it saved."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hashing import ChunkHasher
from components.checkpoint.manifest import MANIFEST, FileEntry, parse, render

JOB = JobIdentity({"model.name": "tiny", "training.seq_len": 512}, {"dp_shard": 1}, "[training]\n", "abc123")
OTHER = JobIdentity({"model.name": "tiny", "training.seq_len": 256})
STATE = {
    "train_state": {"step": 1, "best": float("inf"), "lr": 0.1},
    "lr_scheduler": {"last": 3},
    "dataloader": {"streams": [[0, 5], [1, 7]]},
}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(5, 3, generator=generator),
        "model.half": torch.randn(4, generator=generator).bfloat16(),
        "model.count": torch.randint(0, 99, (2,), generator=generator),
        "optimizer.w.exp_avg": torch.randn(5, 3, generator=generator),
        "optimizer.w.step": torch.tensor(float(seed)),
    }


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors(0).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def raw(x: Tensor) -> list[int]:
        return x.contiguous().view(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and raw(a[k]) == raw(b[k]) for k in a)


def checkpointer(root: Path, keep: int = 0) -> Checkpointer:
    return Checkpointer(root, keep_latest_k=keep, group=None)


def save(root: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        checkpointer(root, keep).save(step, tensors(step), STATE, JOB)


def loads(root: Path, step: int) -> bool:
    """Whether this step loads, with the bytes that were saved at it."""
    found = zeros()
    return checkpointer(root).load(step, found, job=JOB) == STATE and same(found, tensors(step))


def reseal(folder: Path) -> None:
    """Give the folder a manifest that is right for what lies in it now, as a forger would."""
    path = folder / MANIFEST
    manifest = parse(path.read_bytes())
    path.write_bytes(render(dataclasses.replace(manifest, files=[_entry(folder, e.name) for e in manifest.files])))


def _entry(folder: Path, name: str) -> FileEntry:
    hasher = ChunkHasher()
    hasher.update(memoryview((folder / name).read_bytes()))
    return FileEntry(name, hasher.size, hasher.hashes())
