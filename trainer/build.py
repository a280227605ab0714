"""From a TrainSpec to a model that holds values: meta device, converters, layout, memory, initialization."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from components.config.job_config import JobConfig
from components.layers.initialize import Init, initialize
from components.mesh.parallel_dims import ParallelDims
from models.train_spec import ModelArgs, TrainSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(Protocol):
    """What the Trainer asks of a model."""

    output: nn.Module
    """The head, which the loss calls."""

    def __call__(self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None) -> Tensor:
        """Token ids (rows, seq) → hidden states (rows, seq, dim) after the final norm."""
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
            return spec.model_cls(args)
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


def build_model(
    spec: TrainSpec,
    args: ModelArgs,
    job: JobConfig,
    dims: ParallelDims,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """The model, laid out over the mesh, with the values that `seed` gives it whatever the layout.

    `dtype` is the type of compute. With CPU offload the parameters' memory is the host's.
    """
    model = spec.parallelize_fn(build_on_meta(spec, args, job), dims, job, dtype)
    materialize(model, "cpu" if job.training.enable_cpu_offload else device)
    initialize(model, cast(Model, model).inits(), seed)
    return model
