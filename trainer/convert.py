"""Conversion of whole checkpoints, apart from any job: what `scripts/convert.py` does.

Weights go tensor by tensor from one format into the other, so that a laptop can convert what it could never hold. A
family's own table says what is what; everything is checked before the first tensor is written, and what is written is a
checkpoint like any other: hashed, with a manifest, and of a model that a job can recognize as its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.boxes import Box, require_held
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity, fingerprint_of
from components.checkpoint.hf_config import Adapter
from components.checkpoint.hf_import import TheirFiles, open_hf
from components.checkpoint.hf_record import AS_IN_SOURCE, SOURCE, read_record
from components.checkpoint.links import Shape
from components.checkpoint.manifest import Kind, read_manifest
from components.checkpoint.names import Table
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.checkpoint.storage import open_folder, step_name
from components.checkpoint.titan import TitanCheckpoint, open_titan, titan_table, train_state
from components.config.job_config import JobConfig
from components.config.model import Model
from components.config.moe import MoE
from components.runtime.errors import CheckpointError, ConfigError
from models.decoder.args import DecoderArgs
from models.train_spec import TrainSpec, families, get_args
from trainer.build import build_on_meta
from trainer.command import import_custom
from trainer.exports import job_of
from trainer.persistence import NO_ADAPTER

ALONE = Ranks(None)
NEIGHBOURS: Mapping[str, bool] = {"llama3": True, "qwen3": False}
"""Families that TorchTitan's checkpoints are read of: whether their heads pair neighbours there."""
_BIAS = ".moe.expert_bias"
_BIAS_RATE = 0.001  # TorchTitan's; it only has to be there


@dataclass(frozen=True)
class Target:
    """The model that a checkpoint is made of."""

    name: str
    """Family."""
    flavor: str
    """Flavor."""
    spec: TrainSpec
    """How it is built."""
    args: Any
    """Its arguments."""
    job: JobConfig
    """A job of it, all else by default."""

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors as `model.<name>`, without memory."""
        return model_tensors([build_on_meta(self.spec, self.args, self.job)])

    def identity(self, layout: Mapping[str, Any]) -> JobIdentity:
        """Whose checkpoint it is: any job's of this model."""
        keys = {key: value for key, value in fingerprint_of(self.job, {}).items() if key.startswith(("model.", "moe."))}
        return JobIdentity(keys, dict(layout), f'[model]\nname = "{self.name}"\nflavor = "{self.flavor}"\n')


def target_of(name: str, flavor: str, custom_import: str = "", *, mtp_layers: int | None = None, **moe: Any) -> Target:
    """The model of that name; `mtp_layers` and `moe` are keys of a job that differ from the flavor's numbers. Raises
    ConfigError that lists what there is."""
    job = JobConfig(model=Model(name=name, flavor=flavor, mtp_layers=mtp_layers), moe=MoE(**moe))
    return _target(job, custom_import)


def target_of_checkpoint(path: str, custom_import: str = "") -> Target:
    """The model that a checkpoint of ours is of. Raises CheckpointError, ConfigError."""
    return _target(job_of(read_manifest(open_folder(path))), custom_import)


def _target(job: JobConfig, custom_import: str) -> Target:
    import_custom(custom_import)
    spec, args = families.lookup(job.model.name).load(), get_args(job.model.name, job.model.flavor)
    return Target(job.model.name, job.model.flavor, spec, spec.args_for_job_fn(args, job), job)


def hf_to_dcp(path: str, out: str, target: Target, dtype: str = "source") -> str:
    """Convert Hugging Face weights into the checkpoint `{out}/step-0`, which is returned. Quantized ones are
    dequantized.

    `path`, `out`: paths or URLs. A job takes it as `checkpoint.initial_load_path`, or as the seed that it starts from,
    if `out` is its own folder of checkpoints. Raises ConfigError, CheckpointError.
    """
    adapter = target.spec.state_dict_adapter
    if adapter is None:
        raise ConfigError(f"model.name = {target.name!r}: {NO_ADAPTER}")
    tensors = target.tensors()
    found = _open(path, tensors, adapter, target.args)
    found.check_copies({f"model.{name}": _outline(shape, torch.float32) for name, shape in found.table.ours.items()})
    boxes = {name: _from_hf(found, name, tensor, dtype) for name, tensor in tensors.items()}
    return _write(out, 0, boxes, {}, target.identity({SOURCE: found.record.plain()}), "model_only")


def _write(out: str, step: int, boxes: Mapping[str, Box], state: dict[str, Any], job: JobIdentity, kind: Kind) -> str:
    """Write a checkpoint where there is none yet; its path."""
    store = Checkpointer(out, keep_latest_k=0, group=None)
    store.prepare()
    if store.storage.exists(name := step_name(step)):
        raise CheckpointError(
            f"'{store.storage.folder(name).path}' is there already: move it away, or take another folder"
        )
    return store.save(step, boxes, state, job, kind).folder.path


def _open(path: str, tensors: Mapping[str, Tensor], adapter: Adapter, args: Any) -> TheirFiles:
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    return open_hf(path, shapes, adapter, args, ALONE, quantized=None)


def _outline(shape: Shape, dtype: torch.dtype) -> Box:
    return Box(torch.empty(shape, dtype=dtype, device="meta"), (0,) * len(shape), shape)


def _from_hf(found: TheirFiles, name: str, tensor: Tensor, dtype: str) -> Box:
    """One of ours, to be read when it is written. What Hugging Face has no place for is a buffer, and zero at first."""
    ours, shape = name.removeprefix("model."), tuple(tensor.shape)
    if ours in found.table.alone:
        return Box(torch.zeros(shape, dtype=tensor.dtype), (0,) * len(shape), shape)
    types = {found.record.type_of(link.theirs) for link in found.table.links if link.ours == ours}
    own = max((getattr(torch, each) for each in types), key=lambda each: each.itemsize)
    box = _outline(shape, own if dtype == "source" else getattr(torch, dtype))

    def read() -> Tensor:
        wide = torch.empty(shape, dtype=own)
        found.load({name: Box(wide, (0,) * len(shape), shape)})
        narrow = wide.to(box.data.dtype)
        require_held(name, wide, narrow)
        return narrow

    return replace(box, source=read)


def titan_to_dcp(path: str, out: str, target: Target, dtype: str = "source", weights_only: bool = False) -> str:
    """Convert a checkpoint of TorchTitan into `{out}/step-N`, which is returned; with Adam's state and the number of
    steps, where it has them, else weights alone.

    What is not taken over: where the data go on (TorchTitan's loaders know ranks, ours rows), random generators, and
    the learning-rate schedule, which here follows from the step. Raises ConfigError, CheckpointError.
    """
    if target.name not in NEIGHBOURS or not isinstance(target.args, DecoderArgs):
        known = ", ".join(sorted(NEIGHBOURS))
        raise ConfigError(f"model.name = {target.name!r}: TorchTitan's checkpoints are read of {known}")
    source = open_titan(open_folder(path))
    target, table = as_titan(source, target)
    source.require_model(table)
    optimizer = source.has_optimizer and not weights_only
    step = source.number("step") if optimizer else 0
    if optimizer:
        source.require_optimizer(table)
    if step is None:
        raise CheckpointError(f"'{path}': it has an optimizer's state, but no train_state.step: take --weights-only")
    made = source.sources(table, optimizer)
    boxes = {name: _from_titan(name, *each, dtype) for name, each in made.items()}
    state = {"train_state": train_state(source, step), "lr_scheduler": {"start": 0}} if optimizer else {}
    kind = "training" if optimizer else "model_only"
    return _write(out, step, boxes, state, target.identity({"sizes": {}} if optimizer else {}), kind)


def export_type(path: str, dtype: str) -> str:
    """The type of most weights in an export of that `dtype`."""
    record = read_record(read_manifest(open_folder(path)).layout)
    return record.dtype if dtype == AS_IN_SOURCE and record else dtype


def is_whole(path: str) -> bool:
    """Whether a checkpoint of ours holds more than weights."""
    return read_manifest(open_folder(path)).kind == "training"


def as_titan(source: TitanCheckpoint, target: Target) -> tuple[Target, Table]:
    """The model with selection biases where theirs has them, and the table between the two."""
    if any(name.endswith(_BIAS) for name in source.model):
        target = replace(target, job=replace(target.job, moe=MoE(bias_rate=_BIAS_RATE)))
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in target.tensors().items()}
    return target, titan_table(shapes, _neighbours(target), target.args.tied_embeddings)


def _from_titan(name: str, shape: Shape, own: str, make: Any, dtype: str) -> Box:
    """One of ours; `dtype` is that of weights, while moments stay as they are."""
    kept = dtype == "source" or not name.startswith("model.") or name.endswith(_BIAS)
    box = _outline(shape, getattr(torch, own if kept else dtype))

    def read() -> Tensor:
        wide = make()
        narrow = wide.to(box.data.dtype)
        require_held(name, wide, narrow)
        return narrow

    return replace(box, source=read)


def _neighbours(target: Target) -> dict[str, int]:
    """Matrices of queries and keys whose rows change places, with their heads."""
    if not NEIGHBOURS[target.name]:
        return {}
    found: dict[str, int] = {}
    for layer, block in enumerate(target.args.blocks):
        attention = block.attention
        found[f"layers.{layer}.attention.wq.weight"] = attention.n_heads
        found[f"layers.{layer}.attention.wk.weight"] = attention.n_kv_heads
    return found
