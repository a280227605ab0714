"""The one parallelizer: a model's plan and the job's configuration, applied in the only order that works.

Recompute comes first, so that compile sees it and can trade inside of each block; compile second, so that FSDP's hooks
stay outside of the compiled code; data parallelism last, around all that.
"""

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.compile import compile_blocks
from components.parallel.data import shard
from components.parallel.modules import find
from components.parallel.recompute import recompute
from components.runtime.errors import MeshError

UNPLANNED = {
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
}
"""Degrees that plans cannot describe yet, and the keys that set them."""


def parallelize(
    model: nn.Module, plan: Plan, dims: ParallelDims, job: JobConfig, compute_dtype: torch.dtype
) -> nn.Module:
    """Make a model ready for its mesh, in place, and return it.

    Args:
        model: On any device, meta included.
        plan: The model's structure.
        dims: The mesh.
        job: `activation_checkpoint`, `compile`, `parallelism` and `training.enable_cpu_offload` are read.
        compute_dtype: Type that parameters are cast to for compute (`training.mixed_precision_param`, resolved).

    Raises:
        MeshError: A degree that plans cannot describe, or a plan that is not this model's.
        ConfigError: Settings of recompute that cannot be.
    """
    _refuse_unplanned(dims.degrees)
    if not find(model, plan.blocks):
        raise MeshError(f"the plan's blocks are {', '.join(plan.blocks)}, but {type(model).__name__} has none of them")
    recompute(model, plan, job.activation_checkpoint)
    compile_blocks(model, plan, job.compile)
    shard(model, plan, dims, job.parallelism, compute_dtype, job.training.enable_cpu_offload)
    return model


def _refuse_unplanned(degrees: Degrees) -> None:
    for name, key in UNPLANNED.items():
        degree = getattr(degrees, name)
        if degree > 1:
            raise MeshError(f"parallelism.{key} = {degree}: not yet supported by this model: set it to 1")
