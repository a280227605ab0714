"""Checkpointer: saves, finds, verifies and loads the checkpoints of one job.

A checkpoint is a folder `step-N` with a valid manifest; `storage` says how it comes to be, `manifest` what makes it
valid. What is loaded was verified before, down to its last byte: hashing runs at the speed of the storage, while a
weight that was damaged in silence costs a run. Saving blocks and raises; `saver` does it in the background.

`steps` looks at the disk from one rank. All other public methods are collective, and raise on all ranks alike.
"""

import logging
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from components.checkpoint.boxes import Box, as_boxes
from components.checkpoint.contents import read_files, require_savable, write_files
from components.checkpoint.fingerprint import JobIdentity, require_same_job
from components.checkpoint.manifest import MANIFEST, FileEntry, Kind, Manifest, render
from components.checkpoint.ranks import Ranks, describe
from components.checkpoint.retention import doomed_steps
from components.checkpoint.state import ALL_BUT_MODEL, check_exclude, of_model, state_problems, without
from components.checkpoint.storage import Folder, open_storage, step_name
from components.checkpoint.tensors import Index, read_tensors, target_problems
from components.checkpoint.verifying import Verifier, Verify
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger

Resume = Literal["auto", "must", "never"]


class Saved(NamedTuple):
    """A checkpoint that is there."""

    folder: Folder
    bytes: int
    """Bytes of its files over all ranks; 0 if it was there already, valid and of this job."""


class Checkpointer:
    """The checkpoints below `root`, a path (`{dump_folder}/{checkpoint.folder}`) or a URL.

    `keep_latest_k`: checkpoints that stay after a save, 0 for all. `group`: the ranks that save and load together, a
    process group of the CPU; None for a single process. `verify`: what is checked before a checkpoint is trusted
    (`checkpoint.verify`). Creating a Checkpointer touches no file.
    """

    def __init__(
        self, root: str | Path, *, keep_latest_k: int, group: ProcessGroup | None, verify: Verify = "hashes"
    ) -> None:
        self.storage = open_storage(root)
        self._keep = keep_latest_k
        self.ranks = Ranks(group)
        self._broken: set[int] = set()
        self._verifier = Verifier(self.storage, self.ranks, verify)

    def steps(self) -> list[int]:
        """Steps with a valid checkpoint, ascending: manifest and sizes are checked, hashes are not. Not collective."""
        return [*self._verifier.valid()]

    def latest(self, strict: bool = False) -> int | None:
        """The newest checkpoint that is whole to the last byte; None if there is none at all.

        Says loudly when it has to pass over a broken one. Raises CheckpointError if all are broken: a program must not
        decide to start again from nothing. `strict`: raises it if the newest one is broken.
        """
        broken: list[str] = []
        for step in reversed(self.ranks.on_first(self._verifier.finished)):
            problems = self.verify(step)
            if not problems:
                self._log(logging.WARNING, *(f"{problem}: falling back to step-{step}" for problem in broken))
                return step
            broken += problems
            self._broken.add(step)
            if strict:
                break
        if broken and strict:
            mend = 'move it away, or take "auto" to go on from the one before'
            raise CheckpointError(f'checkpoint.resume = "must": {broken[0]}; {mend}')
        if broken:
            mend = "move them away or start a new job.dump_folder"
            raise CheckpointError(f"no checkpoint in '{self.storage.path}' is valid: {'; '.join(broken)}; {mend}")
        return None

    def resolve(self, load_step: int, resume: Resume = "auto") -> int | None:
        """The step that `checkpoint.load_step` means: −1 the latest (None if there is none), else exactly that one.

        Raises CheckpointError for a step without a valid checkpoint; the message lists those that there are. With
        `resume` = "must" (`checkpoint.resume`) also if there is none at all, or if the newest is broken.
        """
        if load_step == -1:
            step = self.latest(strict=resume == "must")
            if step is None and resume == "must":
                raise CheckpointError(
                    f'checkpoint.resume = "must": there is no checkpoint in \'{self.storage.path}\'; take "auto" for a'
                    " job's first run, whatever it starts from"
                )
            return step
        if problems := self.verify(load_step):
            there = self.ranks.on_first(lambda: ", ".join(f"step-{step}" for step in self.steps())) or "none"
            raise CheckpointError(
                f"checkpoint.load_step = {load_step}: {problems[0]}; valid in '{self.storage.path}': {there}"
            )
        return load_step

    def read_manifest(self, step: int | Path | str) -> Manifest:
        """The manifest of a checkpoint; sizes are checked, hashes are not. Raises CheckpointError."""
        return self._verifier.manifest(step)

    def verify(self, step: int | Path | str) -> list[str]:
        """Check a checkpoint as `verify` says, the ranks sharing the work; what is wrong, empty if nothing is."""
        return self._verifier.problems(step)

    def prepare(self) -> None:
        """Before the first save: create the folder, see that it can be written to, remove what killed runs left.

        Raises CheckpointError if it cannot be written to.
        """
        what = f"checkpoint.folder: '{self.storage.path}' cannot be written to"
        if removed := self.ranks.on_first(self.storage.prepare, what):
            self._log(
                logging.WARNING, f"removed {len(removed)} unfinished checkpoints of killed runs: {', '.join(removed)}"
            )

    def supersede(self, step: int | None) -> None:
        """Before a run goes on from `step`: rename later checkpoints, which are of another course of the same job.
        None: it starts anew, and all are.

        Else the folder would mix two courses, and a later resume would take the wrong one. They stay, for whoever
        wants them back. Collective.
        """
        going = "starting anew" if step is None else f"going on from step-{step}"
        what = f"{going}: '{self.storage.path}' cannot be changed"
        later = [n for n in self.ranks.on_first(self._verifier.finished, what) if step is None or n > step]
        for n in later:
            why, told = ("broken", "broken") if n in self._broken else ("superseded", "of an earlier course")
            aside = self.ranks.on_first(lambda n=n, why=why: self.storage.set_aside(step_name(n), why), what)
            self._log(logging.WARNING, f"{going}: step-{n} is {told}, now '{aside}'")

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Box],
        state: Mapping[str, Any],
        job: JobIdentity,
        kind: Kind = "training",
        dtype: torch.dtype | None = None,
    ) -> Saved:
        """Save everything that a resume needs.

        `tensors`: `<part>.<name>` → tensor, DTensor, or what this rank holds of one. `state`: part → plain JSON value,
        equal on all ranks. `dtype`: type of floating point values in the files; None: as they are. Saving a step again
        that is there, whole and of the same job, does nothing. Raises CheckpointError on all ranks if anything fails on
        any; no `step-N` appears then, and earlier checkpoints are untouched.
        """
        what = self.failing(step)
        if self._is_saved(step, job, kind, what):
            return Saved(self._verifier.folder(step), 0)
        require_savable(tensors, state, self.ranks, what)
        temporary = self.ranks.on_first(lambda: self.storage.temporary(step_name(step)), what)
        try:
            boxes = self.ranks.everywhere(lambda: as_boxes(tensors, dtype), what)
            files = write_files(temporary, boxes, state, self.ranks, what)

            def commit() -> Saved:
                manifest = render(_manifest(step, kind, files, job))
                final = self.storage.commit(temporary, step_name(step), manifest)
                return Saved(final, sum(entry.size for entry in files))

            saved = self.ranks.on_first(commit, what)
        except CheckpointError:
            self._discard(temporary)
            raise
        self._retain(step)
        return saved

    def failing(self, step: int) -> str:
        """How the message of a save that fails begins."""
        return f"cannot save step-{step} in '{self.storage.path}'"

    def save_model(self, step: int, tensors: Mapping[str, Tensor], job: JobIdentity, dtype: torch.dtype) -> Folder:
        """Save only the model's tensors, as `dtype` (`checkpoint.export_dtype`). Training cannot resume from it."""
        return self.save(step, of_model(tensors), {}, job, "model_only", dtype).folder

    def load(
        self,
        step: int | Path | str,
        tensors: Mapping[str, Tensor],
        *,
        job: JobIdentity | None,
        exclude: Collection[str] = (),
        cast: bool = False,
        like: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Verify a checkpoint and load it into the tensors in place; the saved state, part → value.

        `step`: a step of this job, or the path or URL of any checkpoint. `job`: whose checkpoint it must be; None where
        that does not matter (`initial_load_path`). `exclude`: parts left as they are. `cast`: floating point tensors
        may have another type here. `like`: a state whose parts, keys and types the saved one must have, but for
        `exclude`.
        Raises CheckpointError, before any tensor is touched, for a checkpoint that is broken, of another job or without
        what a resume needs, and for each tensor and piece of state that is missing, unexpected or does not fit.
        """
        check_exclude(exclude)
        folder, manifest = self._verifier.folder(step), self.read_manifest(step)
        _require_complete(folder.name, manifest, exclude)
        if job is not None:
            require_same_job(folder.name, manifest.fingerprint, job.fingerprint)
        self._verifier.require_whole(step)
        what = f"checkpoint {folder.name}"
        index, state = self.ranks.on_first(lambda: read_files(folder, manifest), what)
        index, wanted = without(index, exclude), without(tensors, exclude)
        state = without(state, exclude)
        problems = [] if like is None else state_problems(state, without(like, exclude))
        self._require_fit(index, wanted, cast, what, problems)
        self.ranks.everywhere(lambda: read_tensors(folder, index, wanted), what)
        return state

    def _require_fit(
        self, index: Index, tensors: Mapping[str, Tensor], cast: bool, what: str, problems: list[str]
    ) -> None:
        """Raise CheckpointError with the `problems` so far, and with those of all tensors."""
        names = sorted(index)
        claimed = self.ranks.any_of([name in tensors for name in names])  # with pipeline stages a rank has but some
        unexpected = [name for name, by_any in zip(names, claimed, strict=True) if not by_any]
        extra = [f"not expected here: {', '.join(unexpected)}"] if unexpected else []

        def check() -> None:
            if found := problems + extra + target_problems(index, tensors, cast):
                raise CheckpointError("; ".join(found))

        self.ranks.everywhere(check, f"{what} does not fit")

    def _is_saved(self, step: int, job: JobIdentity, kind: Kind, what: str) -> bool:
        folder = self._verifier.folder(step)
        if not self.ranks.on_first(lambda: self.storage.exists(folder.name), what):
            return False
        if problems := self.verify(step):
            aside = self.ranks.on_first(lambda: self.storage.set_aside(folder.name, "broken"), what)
            self._log(logging.WARNING, f"{problems[0]}: moved aside to '{self.storage.folder(aside).path}'")
            return False
        manifest = self.read_manifest(step)
        require_same_job(folder.name, manifest.fingerprint, job.fingerprint)
        if manifest.kind != kind:
            raise CheckpointError(f"{what}: it is there already, as a {manifest.kind} checkpoint: move it away first")
        self._log(logging.INFO, f"step-{step} is there already, valid and of this job: it stays as it is")
        return True

    def _discard(self, temporary: Folder) -> None:
        if self.ranks.first:
            try:
                self.storage.discard(temporary)
            except (OSError, CheckpointError) as error:
                self._log(logging.WARNING, f"{describe(error)}: '{temporary.path}' stays until the next start")

    def _retain(self, saved: int) -> None:
        if not self.ranks.first or not self._keep:
            return
        try:
            manifests = self._verifier.valid()
            for step in doomed_steps(manifests, self._keep, saved):
                self._delete(step, manifests[step])
        except (OSError, CheckpointError) as error:  # the save itself is done and good
            self._log(logging.WARNING, f"old checkpoints could not be deleted: {describe(error)}")

    def _delete(self, step: int, manifest: Manifest) -> None:
        folder = self._verifier.folder(step)
        if foreign := sorted({*folder.names()} - {entry.name for entry in manifest.files} - {MANIFEST}):
            text = f"'{folder.path}' stays beyond checkpoint.keep_latest_k: it holds other files ({', '.join(foreign)})"
            self._log(logging.WARNING, text)
        else:
            self.storage.delete(folder.name)

    def _log(self, level: int, *texts: str) -> None:
        for text in texts:
            if self.ranks.first:
                logger.log(level, "%s", text)


def _require_complete(name: str, manifest: Manifest, exclude: Collection[str]) -> None:
    if manifest.kind == "hf":
        raise CheckpointError(
            f"checkpoint {name} is an export of weights as Hugging Face safetensors: set checkpoint.initial_load_in_hf"
        )
    if manifest.kind == "model_only" and not {*ALL_BUT_MODEL} <= {*exclude}:
        raise CheckpointError(
            f"checkpoint {name} holds only weights (checkpoint.last_save_model_only): training cannot resume from it; "
            "resume from an earlier one with checkpoint.load_step, or start from its weights with "
            "checkpoint.initial_load_path in a new job.dump_folder"
        )


def _manifest(step: int, kind: Kind, files: list[FileEntry], job: JobIdentity) -> Manifest:
    return Manifest(
        step=step,
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        fingerprint=job.fingerprint,
        layout=job.layout,
        config=job.config,
        versions=job.versions,
        revision=job.revision,
    )
