"""What there is in a folder of checkpoints, told without torch: for people, and for programs that keep house.

Everything is listed, also what is broken and what is no checkpoint, with the reason: a listing that leaves out what it
does not understand is how checkpoints are lost. Nothing is changed but by `prune`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from components.checkpoint.hashing import hash_chunks
from components.checkpoint.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from components.checkpoint.retention import doomed_steps
from components.checkpoint.storage import Folder, Storage, open_folder, open_storage, step_name, step_of
from components.runtime.errors import CheckpointError

_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
_RANKS = _DEGREES[:5]
_OTHERS = {
    ".tmp-": "unfinished: of a run that was killed, or is saving now",
    ".del-": "half deleted, by a run that was killed or is at it now",
    ".superseded-": "set aside: of an earlier course of the job",
    ".broken-": "set aside: broken",
}


@dataclass(frozen=True)
class Found:
    """A folder, and what it is."""

    name: str
    """Its name."""
    manifest: Manifest | None = None
    """What a checkpoint says of itself."""
    problem: str | None = None
    """Why it is no whole checkpoint; None: nothing was found wrong."""
    other: bool = False
    """Whether it does not even bear a checkpoint's name."""


def survey(root: str, hashes: bool) -> list[Found]:
    """What there is at `root`, a folder of checkpoints or a checkpoint, by step; what is none comes last.

    `hashes`: check every byte, not only sizes. Raises CheckpointError if there is nothing, or it cannot be read.
    """
    try:
        if MANIFEST in open_folder(root).names():
            return [examine(open_folder(root), hashes)]
    except OSError as error:
        raise CheckpointError(f"'{root}': {error.strerror or error}") from error
    storage = open_storage(root)
    names = sorted(storage.folder_names(), key=lambda name: (step_of(name) is None, step_of(name) or 0, name))
    if not names:
        raise CheckpointError(f"'{root}': no checkpoint in it, nor any other folder")
    return [_look(storage, name, hashes) for name in names]


def _look(storage: Storage, name: str, hashes: bool) -> Found:
    if step_of(name) is None:
        why = next((why for mark, why in _OTHERS.items() if mark in name), "not a checkpoint: checkpoints are step-N")
        return Found(name, problem=why, other=True)
    found = examine(storage.folder(name), hashes)
    if found.manifest and step_name(found.manifest.step) != name:
        return Found(name, problem=f"its {MANIFEST} says step {found.manifest.step}: the folder has been renamed")
    return found


def examine(folder: Folder, hashes: bool) -> Found:
    """A checkpoint's manifest and whether its files agree with it, by size or to the last byte."""
    try:
        manifest = read_manifest(folder)
        changed = changed_chunks(folder, chunks_of(manifest), manifest.chunk_bytes) if hashes else []
    except (CheckpointError, OSError) as error:
        return Found(folder.name, problem=str(error))
    return Found(folder.name, manifest, "; ".join(changed) or None)


def require_checkpoint(folder: Folder) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was saved. Raises CheckpointError for what is none."""
    found = examine(folder, hashes=True)
    if found.manifest is None or found.problem:
        raise CheckpointError(f"'{folder.path}': {found.problem}")
    if found.manifest.kind == "hf":
        why = "an export of weights as Hugging Face safetensors: give a checkpoint"
        raise CheckpointError(f"'{folder.path}': {why}")
    return found.manifest


def chunks_of(manifest: Manifest) -> list[tuple[FileEntry, int]]:
    """Every chunk that has a hash, as (file, index)."""
    return [(entry, index) for entry in manifest.files for index in range(len(entry.hashes))]


def changed_chunks(folder: Folder, chunks: list[tuple[FileEntry, int]], chunk_bytes: int) -> list[str]:
    """A line for each chunk whose bytes are not those that were saved. Raises CheckpointError, OSError."""
    found = hash_chunks([(partial(folder.open, entry.name), index) for entry, index in chunks], chunk_bytes)
    return [
        f"{entry.name}: bytes {index * chunk_bytes} to {min((index + 1) * chunk_bytes, entry.size)} have changed"
        for (entry, index), value in zip(chunks, found, strict=True)
        if entry.hashes[index] != value
    ]


def size_of(manifest: Manifest) -> int:
    """Bytes of all files but the manifest."""
    return sum(entry.size for entry in manifest.files)


def describe_layout(layout: Mapping[str, Any]) -> str:
    """How a checkpoint's job ran, as "4 × cpu: dp_shard 2, tp 2"; "n/a" where it does not say."""
    degrees = {name: layout[name] for name in _DEGREES if type(layout.get(name)) is int and layout[name] > 0}
    if not {*_RANKS} <= {*degrees}:
        return "n/a"
    ranks = 1
    for name in _RANKS:
        ranks *= degrees[name]
    cut = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    device = layout.get("device")
    return f"{ranks} × {device if isinstance(device, str) else 'rank'}" + (f": {cut}" if cut else "")


@dataclass(frozen=True)
class Fate:
    """What pruning does with a checkpoint."""

    name: str
    """Its name."""
    deleted: bool
    """Whether it goes, or has gone."""
    why: str = ""
    """Why it stays although it is beyond those to keep."""


def prune(root: str, keep: int, dry_run: bool) -> list[Fate]:
    """Delete the oldest checkpoints as `checkpoint.keep_latest_k` does; what becomes of all that are valid.

    Those that stay are checked to the last byte first: a broken one does not count, and is not deleted. What else is in
    the folder is not touched. Raises CheckpointError.
    """
    storage, everything = open_storage(root), survey(root, hashes=False)
    if MANIFEST in open_folder(root).names():
        raise CheckpointError(f"'{root}': a checkpoint: give the folder that it is in")
    valid = {
        found.manifest.step: found.manifest
        for found in everything
        if found.manifest and not found.problem and step_of(found.name) is not None
    }
    fates = []
    while broken := [step for step in _staying(valid, keep) if examine(storage.folder(step_name(step)), True).problem]:
        fates += [Fate(step_name(step), False, "broken: it does not count") for step in broken]
        valid = {step: manifest for step, manifest in valid.items() if step not in broken}
    gone = doomed_steps(valid, keep, max(valid, default=0))
    fates += [Fate(step_name(step), False) for step in valid if step not in gone]
    fates += [_delete(storage, valid[step], dry_run) for step in gone]
    return sorted(fates, key=lambda fate: step_of(fate.name) or 0)


def _staying(valid: Mapping[int, Manifest], keep: int) -> list[int]:
    return sorted({*valid} - {*doomed_steps(valid, keep, max(valid, default=0))})


def _delete(storage: Storage, manifest: Manifest, dry_run: bool) -> Fate:
    name = step_name(manifest.step)
    try:
        foreign = sorted({*storage.folder(name).names()} - {entry.name for entry in manifest.files} - {MANIFEST})
        if foreign:
            return Fate(name, False, f"it holds other files ({', '.join(foreign)})")
        if not dry_run:
            storage.delete(name)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be deleted: {error.strerror or error}") from error
    return Fate(name, True)
