"""When a job is saved, and how it finds its way back: the Trainer's side of `components.checkpoint`.

The parts are those that `checkpoint.exclude_from_loading` names: model, optimizer, lr_scheduler, dataloader,
train_state, rng. Tensors go by name into the checkpoint's tensor files, everything else into its JSON. The schedule is
a pure function of the step, so all that it saves is the step it counts from. The random generators are each rank's own,
and mean something on the same layout only; on another one they are seeded anew, from seed and step."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity, require_same_job
from components.checkpoint.hf_config import Adapter
from components.checkpoint.hf_import import load_hf
from components.checkpoint.hf_record import AS_IN_SOURCE, SOURCE, Record, missing_record, read_record
from components.checkpoint.manifest import Manifest
from components.checkpoint.saver import Saver, SaveResult
from components.checkpoint.state import ALL_BUT_MODEL, check_exclude
from components.checkpoint.storage import Folder, step_name
from components.config.job_config import JobConfig
from components.runtime import seeds
from components.runtime.distributed import new_host_group
from components.runtime.errors import CheckpointError, ConfigError, SaveError
from components.runtime.logging import logger
from trainer.exports import Exports, place
from trainer.parts import Parts, Progress
from trainer.run_folder import STARTED, restart_count

NO_ADAPTER = "the model's family does not say how Hugging Face writes it (TrainSpec.state_dict_adapter)"
EXPORT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    AS_IN_SOURCE: None,  # as they are
}


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from."""

    step: int | str
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
    """Saves and loads one job's parts. With `checkpoint.enable` off it does neither.

    `adapter`, `args`: how Hugging Face writes the model (`TrainSpec.state_dict_adapter`), and the model's arguments.
    """

    def __init__(self, job: JobConfig, adapter: Adapter | None = None, args: Any = None) -> None:
        self.config, self._steps = job.checkpoint, job.training.steps
        config = self.config
        check_exclude(config.exclude_from_loading)
        root = place(job, config.folder)
        group = new_host_group("checkpoint", job.comm.checkpoint_timeout_seconds) if config.enable else None
        self.store = Checkpointer(root, keep_latest_k=config.keep_latest_k, group=group, verify=config.verify)
        self.saver = Saver(self.store, mode=config.async_mode, max_failed_saves=config.max_failed_saves)
        self.saved_step = -1
        self._loaded = -1
        self._under_way = False
        self._record: Record | None = None  # of the Hugging Face files that the weights came from
        self._adapter, self._args = adapter, args
        self.exports = self._build_exports(job, group)
        if config.enable and not config.load_only:
            self.store.prepare()
        if self.exports:
            self.exports.prepare()
        self.source = self._find() if self.config.enable else None
        if self.config.create_seed_checkpoint and self.source is not None:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint = true: '{root}' holds {self.source.describe()} already, and a seed"
                " is the first: set it to false to go on from there, or start a new job.dump_folder"
            )

    def _build_exports(self, job: JobConfig, group: ProcessGroup | None) -> Exports | None:
        """What exports weights, if the job does. Raises ConfigError if its model cannot be."""
        config = self.config
        if not config.enable or config.load_only or not (config.last_save_in_hf or config.export_interval):
            return None
        if self._adapter is None:
            key = "last_save_in_hf = true" if config.last_save_in_hf else f"export_interval = {config.export_interval}"
            raise ConfigError(f"checkpoint.{key}: {NO_ADAPTER}; leave it out")
        return Exports(job, self._adapter, self._args, group)

    def _find(self) -> Source | None:
        """What to start from: a step of one's own folder, else `initial_load_path`, else nothing. Weights at step 0 are
        a seed, and at the last step all that is left of a job that is done; one that was stopped before its first step
        has everything at step 0. Workers that torchrun has started again go on from what they have saved, wherever the
        job began."""
        step, self._under_way = None, self._is_under_way()
        if self.config.resume == "never" and not self._under_way:
            if not self.config.load_only:
                self.store.supersede(None)
        else:
            step = self.store.resolve(-1 if self._under_way else self.config.load_step, self.config.resume)
        if step is not None:
            manifest = self.store.read_manifest(step)
            enough = manifest.kind == "model_only" and (step == 0 or step >= self._steps)
            return Source(step, manifest, model_only=enough)
        if self.config.initial_load_path is None:
            return None
        if self.config.initial_load_in_hf:
            return None
        path = self.config.initial_load_path
        return Source(path, self.store.read_manifest(path), model_only=self.config.initial_load_model_only)

    def _is_under_way(self) -> bool:
        """Whether torchrun has started the workers again, and they have saved something before. Collective."""
        steps = self.store.ranks.on_first(self.store.steps) if restart_count() else []
        if not steps:
            return False
        if since := os.environ.get(STARTED):  # our launcher's
            began = datetime.fromtimestamp(int(float(since)), UTC).isoformat(timespec="seconds")
            return self.store.read_manifest(steps[-1]).created >= began
        return steps[-1] > self.config.load_step

    def _left_out(self, source: Source) -> set[str]:
        """Parts that are not loaded. What this job has made of its start is not that start."""
        config = self.config
        own_start = config.initial_load_path is None or config.load_step != -1
        if source.own and (self._under_way or not own_start):
            return set()
        return {*config.exclude_from_loading}

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

        Raises CheckpointError if the source is broken, of another job, or does not fit; DataError if its data changed;
        ConfigError if weights are to be exported as they came, and did not come from Hugging Face files.
        """
        progress = self._load(parts, identity)
        if self._record is None and self._writes_weights() and self.config.export_dtype == AS_IN_SOURCE:
            raise ConfigError(missing_record("checkpoint.export_dtype"))
        return progress

    def _writes_weights(self) -> bool:
        """Whether `checkpoint.export_dtype` says anything."""
        config = self.config
        return config.enable and not config.load_only and bool(self.exports or config.last_save_model_only)

    def _load(self, parts: Parts, identity: JobIdentity) -> Progress:
        source = self.source
        if source is None:
            if self.config.enable and self.config.initial_load_in_hf and self.config.initial_load_path:
                self._load_hf(self.config.initial_load_path, parts)
            return Progress()
        left_out = self._left_out(source)
        if source.own and not source.model_only and "train_state" in left_out:
            raise ConfigError(
                "checkpoint.exclude_from_loading = 'train_state': steps would count from 0 in a folder that holds"
                f" step-{source.step}; start from it with checkpoint.initial_load_path in a new job.dump_folder"
            )
        exclude = {*left_out, *(ALL_BUT_MODEL if source.model_only else ())}
        progress = self._restore(source, parts, identity, exclude)
        if isinstance(source.step, int):
            self.saved_step = source.step
            self._loaded = -1 if source.model_only else source.step
            if not self.config.load_only:
                self.store.supersede(source.step)
        return progress

    def _load_hf(self, path: str, parts: Parts) -> None:
        """Bring the weights to those of Hugging Face safetensors."""
        if self._adapter is None:
            raise ConfigError(f"checkpoint.initial_load_in_hf = true: {NO_ADAPTER}; set it to false")
        how = {"verify": self.config.verify, "quantized": self.config.initial_load_in_hf_quantized}
        self._record = load_hf(path, parts.weights, self._adapter, self._args, self.store.ranks, **how)
        parts.equalize()

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint of this run's own that a running job can go back to, with everything
        that it has; None if there is none yet. Collective. Raises CheckpointError if all are broken."""
        self.saver.wait()
        step = self.store.latest()
        if step is None or self.store.read_manifest(step).kind != "training":
            return None
        partly = self.source is not None and self.source.step == step and self._left_out(self.source)
        return None if partly else step

    def reload(self, step: int, parts: Parts, identity: JobIdentity) -> Progress:
        """Bring the parts of a running job back to where its checkpoint `step` (`newest`) left them, as `load` does."""
        progress = self._restore(Source(step, self.store.read_manifest(step), False), parts, identity, ())
        self.saved_step = self._loaded = step
        self.store.supersede(step)
        return progress

    def _restore(self, source: Source, parts: Parts, identity: JobIdentity, exclude: Collection[str]) -> Progress:
        """Read all but the excluded parts, in place. Random generators that were dealt otherwise are seeded anew."""
        if source.own and source.model_only:  # nothing but the model has to be the same yet
            saved, ours = _of_model(source.manifest.fingerprint), _of_model(identity.fingerprint)
            require_same_job(source.describe(), saved, ours)
        if "model" not in exclude:
            self._record = read_record(source.manifest.layout)
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
        if source.own and source.model_only:
            progress.step = source.manifest.step
        whole = {"train_state", "lr_scheduler"} <= {*state}  # where one counts anew, the other cannot go on
        start = state["lr_scheduler"]["start"] if whole else progress.step
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
        folder = self.store.save_model(0, tensors, self._recording(identity), stored)
        logger.info("seed checkpoint: %s; a run of this job without create_seed_checkpoint starts from it", folder)

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this step is to be saved."""
        config = self.config
        if not config.enable or config.load_only or step == self.saved_step:
            return False
        return last or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def export_is_due(self, step: int, last: bool) -> bool:
        """Whether this step's weights are to be exported."""
        return self.exports is not None and self.exports.is_due(step, last)

    def save_due(self, progress: Progress, parts: Parts, identity: JobIdentity, *, last: bool) -> None:
        """Save and export what is due after `progress.step`; from the training thread. Never raises for a save that
        fails. Collective."""
        step, exports = progress.step, self.exports
        exported = self.export_is_due(step, last)
        if self.is_due(step, last):
            then = exports.run if exports and exported else None
            self.save(progress, parts, identity, weights_only=last and self.config.last_save_model_only, then=then)
        elif exports and exported:
            # As they are: the export narrows them, and refuses values that it cannot hold.
            how = {"through": exports.scratch, "then": exports.run_and_drop, "dtype": None}
            self._save_weights(progress, parts, identity, **how)

    def export_missed(self, last: bool) -> None:
        """Export the checkpoint that the job goes on from, if it was killed before it had. Before training. Raises
        SaveError for the `last` step's. Collective."""
        exports, step = self.exports, self._loaded
        if exports is None or step < 1 or not exports.is_due(step, last):
            return
        try:
            if exports.is_missing(step):
                exports.run(self.store.storage.folder(step_name(step)))
        except CheckpointError as error:
            if last:
                raise SaveError(str(error)) from error
            if self.store.ranks.first:
                logger.error("%s; the checkpoint is as it was", error)

    def save(
        self,
        progress: Progress,
        parts: Parts,
        identity: JobIdentity,
        *,
        weights_only: bool = False,
        wait: bool = False,
        then: Callable[[Folder], None] | None = None,
    ) -> None:
        """Save the job as it is after `progress.step`, in the background if it may. What becomes of it `poll` tells.

        `wait`: not in the background. `then`: see `Saver.save`. Collective.
        """
        if weights_only:
            self._save_weights(progress, parts, identity, wait=wait, then=then)
        else:
            drawn = progress.generators or seeds.generator_state(parts.device)
            self.saver.save(
                progress.step,
                {**parts.tensors, **self._generators(parts, drawn)},
                lambda: self._state(progress, parts, parts.table(progress.cursors, self.store.ranks)),
                self._recording(identity),
                wait=wait,
                then=then,
            )
        self.saved_step = progress.step

    def _save_weights(self, progress: Progress, parts: Parts, identity: JobIdentity, **how: Any) -> None:
        how = {"dtype": EXPORT_DTYPES[self.config.export_dtype], **how}
        self.saver.save(progress.step, parts.weights, {}, self._recording(identity), kind="model_only", **how)

    def _recording(self, identity: JobIdentity) -> JobIdentity:
        """The identity with what is known of the files that the weights came from: it goes where they go."""
        if self._record is None:
            return identity
        return replace(identity, layout={**identity.layout, SOURCE: self._record.plain()})

    def ensure_saved(self, progress: Progress, parts: Parts, identity: JobIdentity) -> bool:
        """Have the job saved as it is after `progress.step`, once this returns. True: it was already.

        From another thread than the training's, while that is held back. Raises CheckpointError. Collective.
        """
        if self._is_kept(progress.step):
            return True
        before = self.saved_step
        self.save(progress, parts, identity, wait=True)
        if error := self.saver.finish()[-1].error:
            self.saved_step = before  # it is due still, as the last step is above all
            raise CheckpointError(error)
        return False

    def _is_kept(self, step: int) -> bool:
        latest = [result for result in self.saver.finish() if result.step == step and result.error is None]
        return step == self._loaded or (step == self.saved_step and bool(latest))  # else it was an export alone

    def poll(self) -> list[SaveResult]:
        """Each step, from the training thread: the saves that have ended since. Raises CheckpointError if too many have
        failed in a row. Collective."""
        return self.saver.poll()

    def finish(self) -> list[SaveResult]:
        """Wait for what is under way, and give what `poll` has not given yet; from the training thread. Collective."""
        return self.saver.finish()

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


def _alike(saved: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two layouts deal the work to the ranks alike."""
    keys = {*saved, *here} - {"sizes", SOURCE}
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
