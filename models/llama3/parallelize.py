"""How Llama 3 is laid out: what the model is, as a Plan, and one call to the applier that all models share."""

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.apply import parallelize

PLAN = Plan(
    blocks=("layers.*",),
    embedding="tok_embeddings",
    head="output",
    tied=(("tok_embeddings.weight", "output.weight"),),
)


def parallelize_llama3(model: nn.Module, dims: ParallelDims, job: JobConfig, dtype: torch.dtype) -> nn.Module:
    """The model laid out over the mesh: recompute, compile, data parallelism; `dtype` is the type of compute."""
    return parallelize(model, PLAN, dims, job, dtype)
