"""From a TrainSpec to a model that holds values: meta device, converters, layout, memory, initialization."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from components.config.job_config import JobConfig
from components.layers.initialize import Init, initialize
from components.mesh.parallel_dims import ParallelDims
from components.optim.optimizers import require_used
from components.parallel.pipeline import Stage
from components.runtime.errors import MeshError
from models.train_spec import ModelArgs, TrainSpec

if TYPE_CHECKING:
    from components.loss.cross_entropy import LossFn
    from components.parallel.pipeline_run import Pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(Protocol):
    """What the Trainer asks of a model."""

    output: nn.Module
    """The head, which the loss calls."""

    def __call__(self, x: Tensor, **inputs: Tensor) -> Tensor:
        """Token ids (rows, seq), or a later stage's hidden states → hidden states (rows, seq, dim).

        `inputs` are the per-token tensors (rows, seq) that `TrainSpec.inputs` names.
        """
        ...

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialized, by its canonical name."""
        ...


def build_on_meta(spec: TrainSpec, args: ModelArgs, job: JobConfig) -> nn.Module:
    """The whole model without memory, its parameters of type `training.dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job.training.dtype])
    try:
        with torch.device("meta"):
            return spec.model_cls(spec.args_for_job_fn(args, job))
    finally:
        torch.set_default_dtype(before)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter memory on `device`, keeping tied parameters tied, which `Module.to_empty` does not."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    model.to_empty(device=device)
    for first, *others in names.values():
        for other in others:
            module, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))


def zero_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Let every buffer be zeros on `device`, where the model computes, also if its parameters are elsewhere."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def build_stages(
    spec: TrainSpec,
    args: ModelArgs,
    job: JobConfig,
    dims: ParallelDims,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> list[Stage]:
    """This rank's stages of the model, laid out over the mesh, with the values that `seed` gives them whatever the
    layout; without pipeline parallelism one, the whole model.

    `dtype` is the type of compute. With CPU offload the parameters' memory is the host's.
    """
    stages = lay_out(spec, args, job, dims, dtype)
    fill(stages, job, device, seed)
    return stages


def lay_out(spec: TrainSpec, args: ModelArgs, job: JobConfig, dims: ParallelDims, dtype: torch.dtype) -> list[Stage]:
    """This rank's stages, laid out over the mesh, still without memory. Raises ConfigError for
    `optimizer.parameter_groups` that take no parameter of the whole model."""
    whole = build_on_meta(spec, args, job)
    names = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    require_used(names, job.optimizer.parameter_groups)
    stages = cut(spec, whole, dims, job)
    for stage in stages:
        spec.parallelize_fn(stage.module, dims, job, dtype)
    return stages


def fill(stages: list[Stage], job: JobConfig, device: torch.device, seed: int) -> None:
    """Give the stages memory, and the values that `seed` gives them."""
    for stage in stages:
        materialize(stage.module, "cpu" if job.training.enable_cpu_offload else device)
        zero_buffers(stage.module, device)
        initialize(stage.module, cast(Model, stage.module).inits(), seed)


def cut(spec: TrainSpec, model: nn.Module, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This rank's stages of a whole model. Raises MeshError if the family has no plan for them."""
    if dims.degrees.pp == 1:
        return [Stage(0, 1, model)]
    if spec.pipelining_fn is None:
        raise MeshError(
            f"parallelism.pipeline_parallel_degree = {dims.degrees.pp}: this model family has no plan for pipeline"
            " parallelism: set it to 1"
        )
    return spec.pipelining_fn(model, dims, job)


def build_pipeline(
    stages: list[Stage], job: JobConfig, dims: ParallelDims, device: torch.device, dtype: torch.dtype, loss: LossFn
) -> Pipeline | None:
    """What runs these stages; None without pipeline parallelism."""
    if dims.degrees.pp == 1:
        return None
    from components.parallel.pipeline_run import Pipeline  # torch's pipelining takes its time to import

    return Pipeline(
        stages, job, dims, device, dtype, lambda hidden, model, batch: loss(hidden, cast(Model, model).output, batch)
    )
