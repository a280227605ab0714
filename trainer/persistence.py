"""When a job is saved, and how it finds its way back: the Trainer's side of `components.checkpoint`.

The parts are those that `checkpoint.exclude_from_loading` names: model, optimizer, lr_scheduler, dataloader,
train_state, rng. Tensors go by name into the checkpoint's tensor files, everything else into its JSON. The schedule is
a pure function of the step, so all that it saves is the step it counts from. The random generators are each rank's own,
and mean something on the same layout only; on another one they are seeded anew, from seed and step."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity, require_same_job
from components.checkpoint.manifest import Manifest
from components.checkpoint.state import ALL_BUT_MODEL, check_exclude
from components.config.job_config import JobConfig
from components.runtime import seeds
from components.runtime.distributed import new_host_group
from components.runtime.errors import CheckpointError, ConfigError
from components.runtime.logging import logger
from trainer.parts import Parts, Progress

EXPORT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from."""

    step: int | Path
    """A step of this run's own folder, or a folder elsewhere."""
    manifest: Manifest
    """What it says of itself."""
    model_only: bool
    """Take only the weights."""

    @property
    def own(self) -> bool:
        """Whether it is a step of this run's own folder."""
        return isinstance(self.step, int)

    def describe(self) -> str:
        """Its name, for messages."""
        return f"step-{self.step}" if isinstance(self.step, int) else str(self.step)


class Persistence:
    """Saves and loads one job's parts. With `checkpoint.enable` off it does neither."""

    def __init__(self, job: JobConfig) -> None:
        self.config = job.checkpoint
        check_exclude(self.config.exclude_from_loading)
        root = Path(job.job.dump_folder) / self.config.folder
        group = new_host_group("checkpoint", job.comm.checkpoint_timeout_seconds) if self.config.enable else None
        self.store = Checkpointer(root, keep_latest_k=self.config.keep_latest_k, group=group)
        self.saved_step = -1
        if self.config.enable and not self.config.load_only:
            self.store.prepare()
        self.source = self._find() if self.config.enable else None
        if self.config.create_seed_checkpoint and self.source is not None:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint = true: '{root}' holds {self.source.describe()} already, and a seed"
                " is the first: set it to false to go on from there, or start a new job.dump_folder"
            )

    def _find(self) -> Source | None:
        """What to start from: a step of one's own folder, else `initial_load_path`, else nothing. Weights at step 0 are
        a seed; a job that was stopped before its first step has everything at step 0."""
        step = None
        if self.config.resume == "never" and not _restarted():
            if not self.config.load_only:
                self.store.supersede(None)
        else:
            step = self.store.resolve(self.config.load_step)
        if step is not None:
            manifest = self.store.read_manifest(step)
            return Source(step, manifest, model_only=step == 0 and manifest.kind == "model_only")
        if self.config.initial_load_path is None:
            return None
        path = Path(self.config.initial_load_path)
        return Source(path, self.store.read_manifest(path), model_only=self.config.initial_load_model_only)

    @property
    def saved_sizes(self) -> dict[str, int]:
        """Sizes that the job which will be resumed had derived (`settle.sizes`); empty for a new one."""
        if self.source is None or self.source.model_only:
            return {}
        found = self.source.manifest.layout.get("sizes")
        if not isinstance(found, dict) or not all(type(size) is int and size > 0 for size in found.values()):
            raise CheckpointError(
                f"checkpoint {self.source.describe()}: its manifest does not say the sizes of its batches: it is not of"
                " this version of Espalier; start from its weights with checkpoint.initial_load_path"
            )
        return found

    def load(self, parts: Parts, identity: JobIdentity) -> Progress:
        """Bring the parts to where the source left them, in place. Returns how far that was; a new job is at step 0.

        Raises CheckpointError if the source is broken, of another job, or does not fit; DataError if its data changed.
        """
        source = self.source
        if source is None:
            return Progress()
        if source.own and not source.model_only and "train_state" in self.config.exclude_from_loading:
            raise ConfigError(
                "checkpoint.exclude_from_loading = 'train_state': steps would count from 0 in a folder that holds"
                f" step-{source.step}; start from it with checkpoint.initial_load_path in a new job.dump_folder"
            )
        exclude = {*self.config.exclude_from_loading, *(ALL_BUT_MODEL if source.model_only else ())}
        progress = self._restore(source, parts, identity, exclude)
        if isinstance(source.step, int):
            self.saved_step = source.step
            if not self.config.load_only:
                self.store.supersede(source.step)
        return progress

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint of this run's own that a running job can go back to, with everything
        that it has; None if there is none yet. Collective. Raises CheckpointError if all are broken."""
        step = self.store.latest()
        if step is None or self.store.read_manifest(step).kind != "training":
            return None
        partly = self.source is not None and self.source.step == step and self.config.exclude_from_loading
        return None if partly else step

    def reload(self, step: int, parts: Parts, identity: JobIdentity) -> Progress:
        """Bring the parts of a running job back to where its checkpoint `step` (`newest`) left them, as `load` does."""
        progress = self._restore(Source(step, self.store.read_manifest(step), False), parts, identity, ())
        self.saved_step = step
        self.store.supersede(step)
        return progress

    def _restore(self, source: Source, parts: Parts, identity: JobIdentity, exclude: Collection[str]) -> Progress:
        """Read all but the excluded parts, in place. Random generators that were dealt otherwise are seeded anew."""
        if source.own and source.model_only:  # nothing but the model has to be the same yet
            saved, ours = _of_model(source.manifest.fingerprint), _of_model(identity.fingerprint)
            require_same_job(source.describe(), saved, ours)
        moved = "rng" not in exclude and not _alike(source.manifest.layout, identity.layout)
        skipped = {*exclude, "rng"} if moved else {*exclude}
        generators = self._generators(parts, seeds.generator_state(parts.device))
        state = self.store.load(
            source.step,
            {**parts.tensors, **generators},
            job=identity if source.own and not source.model_only else None,
            exclude=skipped,
            cast=source.model_only,
            like=self._state(Progress(), parts, []),
        )
        parts.equalize()
        logger.info("loaded %s%s", source.describe(), f", all but {', '.join(sorted(exclude))}" if exclude else "")
        progress = self._progress(source, state, parts)
        if moved:
            logger.info("the layout is not that of %s: random generators are seeded anew", source.describe())
            seeds.reseed(identity.fingerprint["debug.seed"], progress.step, parts.data_rank)
        elif "rng" not in skipped:
            _take(source, lambda: [seeds.set_generator_state(_raw(v), parts.device) for v in generators.values()])
        progress.generators = seeds.generator_state(parts.device)
        return progress

    def _progress(self, source: Source, state: Mapping[str, Any], parts: Parts) -> Progress:
        """What the state says, given to whom it is for."""
        progress = Progress(**state.get("train_state", {}))
        start = state["lr_scheduler"]["start"] if "lr_scheduler" in state else progress.step
        progress.schedule_start = start
        if "train_state" in state and (progress.step != source.manifest.step or progress.tokens < 0):
            raise CheckpointError(f"checkpoint {source.describe()}: its train_state is of step {progress.step}")
        if "train_state" in state and not 0 <= start <= progress.step:
            raise CheckpointError(f"checkpoint {source.describe()}: its lr_scheduler starts at step {start}")
        if "dataloader" in state:
            _take(source, lambda: parts.loader.load_state(state["dataloader"]))
        return progress

    def save_seed(self, parts: Parts, identity: JobIdentity) -> None:
        """Save the weights as they are as step 0, in the type they are stored in; say where. Collective."""
        tensors = parts.weights
        stored = next((value.dtype for value in tensors.values() if value.is_floating_point()), torch.float32)
        folder = self.store.save_model(0, tensors, identity, stored)
        logger.info("seed checkpoint: %s; a run of this job without create_seed_checkpoint starts from it", folder)

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this step is to be saved."""
        config = self.config
        if not config.enable or config.load_only or step == self.saved_step:
            return False
        return last or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def save(self, progress: Progress, parts: Parts, identity: JobIdentity, *, weights_only: bool = False) -> None:
        """Save the job as it is after `progress.step`. Collective."""
        if weights_only:
            dtype = EXPORT_DTYPES[self.config.export_dtype]
            self.store.save_model(progress.step, parts.weights, identity, dtype)
        else:
            state = self._state(progress, parts, parts.table(progress.cursors, self.store.ranks))
            drawn = progress.generators or seeds.generator_state(parts.device)
            self.store.save(progress.step, {**parts.tensors, **self._generators(parts, drawn)}, state, identity)
        self.saved_step = progress.step

    def _state(self, progress: Progress, parts: Parts, table: list[list[int]]) -> dict[str, Any]:
        """Everything of a job that is no tensor, as part → plain JSON value."""
        return {
            "train_state": {
                "step": progress.step,
                "tokens": progress.tokens,
                "recent": progress.recent,
                "passed_over": progress.passed_over,
            },
            "lr_scheduler": {"start": progress.schedule_start},
            "dataloader": parts.loader.state_dict(table),
        }

    def _generators(self, parts: Parts, state: bytes) -> dict[str, Tensor]:
        """This rank's random generators as a tensor that no other rank has."""
        return {f"rng.{self.store.ranks.rank}": torch.frombuffer(bytearray(state), dtype=torch.uint8)}


def _restarted() -> bool:
    """Whether torchrun has started the workers again: what is there is then of this course already."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _alike(saved: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two layouts deal the work to the ranks alike."""
    keys = {*saved, *here} - {"sizes"}
    return all(key in saved and key in here and saved[key] == here[key] for key in keys)


def _raw(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _take(source: Source, load: Callable[[], object]) -> None:
    """Let something take what was saved. Raises CheckpointError if it is not of the form that it saves."""
    try:
        load()
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {source.describe()}: {type(error).__name__}: {error}") from error


def _of_model(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint that says what the weights are of."""
    return {key: value for key, value in fingerprint.items() if key.startswith(("model.", "quantize."))}
