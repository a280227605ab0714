"""The one parallelizer: a model's plan and the job's configuration, applied in the only order that works.

Tensor parallelism comes first: it replaces the parameters, and the forward of single layers, which all the others wrap.
Recompute comes before compile, which then sees it and can trade inside of each block; compile before data parallelism,
whose hooks stay outside of the compiled code.
"""

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.compile import compile_blocks
from components.parallel.context import share_sequence
from components.parallel.data import shard
from components.parallel.expert import expert
from components.parallel.modules import find
from components.parallel.recompute import recompute
from components.parallel.tensor import tensor
from components.runtime.errors import MeshError


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
        MeshError: A degree that the plan does not describe, or a plan that is not this model's.
        ConfigError: Settings of recompute that cannot be.
    """
    if dims.degrees.pp == 1 and not find(model, plan.blocks):  # a pipeline stage may be the embedding or head alone
        raise MeshError(f"the plan's blocks are {', '.join(plan.blocks)}, but {type(model).__name__} has none of them")
    tensor(model, plan, dims, job)
    share_sequence(model, plan, dims.axis("cp"), job.parallelism)
    expert(model, plan, dims)
    compiled = job.compile.enable and "model" in job.compile.components
    recompute(model, plan, job.activation_checkpoint, job.job.dump_folder, compiled=compiled)
    compile_blocks(model, plan, job.compile)
    if job.comm.mode == "local_tensor":
        from components.parallel.one_process import replicate  # what it needs of torch is not public

        replicate(model, plan, dims)
    else:
        shard(model, plan, dims, job.parallelism, compute_dtype, job.training.enable_cpu_offload)
    return model
