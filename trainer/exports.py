"""When a job's weights are exported as Hugging Face safetensors, where to, and from what.

An export reads a checkpoint that has just been saved, in the thread that saved it. Where a step is exported but has no
checkpoint, its weights are saved for that alone, beside the exports, and removed afterwards: they must not be among the
checkpoints, where a resume would find them newest and without the rest."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from torch.distributed import ProcessGroup

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.hf_assets import tokenizer_files
from components.checkpoint.hf_config import Adapter
from components.checkpoint.hf_export import export_hf
from components.checkpoint.inspect import require_checkpoint
from components.checkpoint.manifest import Manifest, read_manifest
from components.checkpoint.ranks import Ranks
from components.checkpoint.storage import Folder, open_folder, open_storage, step_folders, step_name
from components.config.job_config import JobConfig
from components.config.model import Model
from components.config.moe import MoE
from components.runtime.errors import CheckpointError, ConfigError
from models.train_spec import families, get_args
from trainer.command import import_custom

SCRATCH = ".weights"
"""Folder beside the exports, of weights that are saved only to be exported."""
_OF_THE_SHAPE = ("model.mtp_layers", "moe.balance_coefficient", "moe.bias_rate")
"""Keys that change a flavor's numbers."""


def place(job: JobConfig, folder: str) -> Path | str:
    """A folder of the job's: inside of its dump folder, unless it is a URL."""
    return folder if "://" in folder else Path(job.job.dump_folder) / folder


class Exports:
    """The exports of one job. Creating it touches no file."""

    def __init__(self, job: JobConfig, adapter: Adapter, args: Any, group: ProcessGroup | None) -> None:
        self.config, self.adapter, self.args = job.checkpoint, adapter, args
        root = place(job, self.config.export_folder)
        self.target = open_storage(root)
        self.scratch = Checkpointer(f"{root}/{SCRATCH}", keep_latest_k=0, group=group)
        self.ranks = self.scratch.ranks
        self.assets = job.model.tokenizer_path or job.model.hf_assets_path

    def prepare(self) -> None:
        """Before the first export: see that it can be written to, and remove what killed runs left.

        Raises CheckpointError. Collective.
        """
        key = f"checkpoint.export_folder: '{self.target.path}' cannot be written to"
        self.ranks.on_first(self._prepare, key)

    def _prepare(self) -> None:
        self.target.prepare()
        self.scratch.storage.prepare()
        for step in step_folders(self.scratch.storage):
            self.scratch.storage.delete(step_name(step))

    def is_due(self, step: int, last: bool) -> bool:
        """Whether the weights after this step are exported."""
        each = self.config.export_interval
        return (last and self.config.last_save_in_hf) or bool(each and step % each == 0)

    def is_missing(self, step: int) -> bool:
        """Whether nothing is there of that step. Collective."""
        name = step_name(step)
        return not self.ranks.on_first(lambda: self.target.exists(name), f"cannot export to '{self.target.path}'")

    def run(self, source: Folder) -> None:
        """Export a checkpoint. Raises CheckpointError on all ranks. Collective."""
        what = f"cannot export {source.name}"
        manifest = self.ranks.on_first(lambda: read_manifest(source), what)
        how = {"dtype": self.config.export_dtype, "ranks": self.ranks, "assets": self.assets}
        export_hf(source, manifest, self.target, step_name(manifest.step), self.adapter, self.args, **how)

    def run_and_drop(self, source: Folder) -> None:
        """Export weights that were saved for that alone, and remove them."""
        try:
            self.run(source)
        finally:
            self.ranks.on_first(lambda: self.scratch.storage.delete(source.name), f"cannot remove '{source.path}'")


def export_checkpoint(path: str, out: str, dtype: str, assets: str | None, custom_import: str) -> str:
    """Export the weights of any checkpoint, apart from its job, into `{out}/step-N`, which is returned.

    `path`, `out`: paths or URLs. `assets`: folder of the tokenizer. The model is that of the checkpoint's job; what is
    not built in `custom_import` registers: a checkpoint is data, so the module that it names is not imported. Raises
    ConfigError for a model that is not known or cannot be exported, CheckpointError for one that is broken.
    """
    source, ranks = open_folder(path), Ranks(None)
    manifest = require_checkpoint(source)
    if assets is not None and not tokenizer_files(assets):
        raise ConfigError(f"--assets: no tokenizer's files in '{assets}'")
    import_custom(custom_import)
    job = job_of(manifest)
    spec = families.lookup(job.model.name).load()
    if (adapter := spec.state_dict_adapter) is None:
        raise ConfigError(f"model.name = {job.model.name!r}: its family does not say how Hugging Face writes it")
    target = open_storage(out)
    ranks.on_first(target.prepare, f"'{out}' cannot be written to")
    folder = step_name(manifest.step)
    args = spec.args_for_job_fn(get_args(job.model.name, job.model.flavor), job)
    export_hf(source, manifest, target, folder, adapter, args, dtype=dtype, ranks=ranks, assets=assets)
    return target.folder(folder).path


def job_of(manifest: Manifest) -> JobConfig:
    """A job of the same model: its family and flavor, and the keys that change the flavor's numbers."""
    said = manifest.fingerprint
    name, flavor = (said.get(f"model.{key}") for key in ("name", "flavor"))
    if not (isinstance(name, str) and isinstance(flavor, str)):
        raise CheckpointError("its manifest does not say what model it is of")
    depth, coefficient, rate = (said.get(key) for key in _OF_THE_SHAPE)
    if not (depth is None or type(depth) is int) or any(
        type(n) not in (int, float, NoneType) for n in (coefficient, rate)
    ):
        raise CheckpointError(f"its manifest says no numbers of {', '.join(_OF_THE_SHAPE)}")
    model = Model(name=name, flavor=flavor, mtp_layers=depth)
    return JobConfig(model=model, moe=MoE(balance_coefficient=coefficient, bias_rate=rate))
