"""When a job's weights are exported as Hugging Face safetensors, where to, and from what.

An export reads a checkpoint that has just been saved, in the thread that saved it. Where a step is exported but has no
checkpoint, its weights are saved for that alone, beside the exports, and removed afterwards: they must not be among the
checkpoints, where a resume would find them newest and without the rest."""

from __future__ import annotations

from pathlib import Path
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
from components.runtime.errors import CheckpointError, ConfigError
from models.train_spec import families, get_args
from trainer.command import import_custom

SCRATCH = ".weights"
"""Folder beside the exports, of weights that are saved only to be exported."""


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
    name, flavor = model_of(manifest)
    adapter = families.lookup(name).load().state_dict_adapter
    if adapter is None:
        raise ConfigError(f"model.name = {name!r}: its family does not say how Hugging Face writes it")
    target = open_storage(out)
    ranks.on_first(target.prepare, f"'{out}' cannot be written to")
    folder = step_name(manifest.step)
    args = get_args(name, flavor)
    export_hf(source, manifest, target, folder, adapter, args, dtype=dtype, ranks=ranks, assets=assets)
    return target.folder(folder).path


def model_of(manifest: Manifest) -> tuple[str, str]:
    """Family and flavor, of the job's fingerprint."""
    name, flavor = (manifest.fingerprint.get(f"model.{key}") for key in ("name", "flavor"))
    if not (isinstance(name, str) and isinstance(flavor, str)):
        raise CheckpointError("its manifest does not say what model it is of")
    return name, flavor
