"""How Llama 3 is laid out: what the model is, as a Plan, and one call to the applier that all models share."""

from typing import cast

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns, Gathered, Plan, Replicated, Rows
from components.parallel.apply import parallelize
from components.parallel.pipeline import Stage, split
from models.llama3.args import ORDER, Llama3Args
from models.llama3.model import Llama3


def llama3_plan(args: Llama3Args) -> Plan:
    """What a Llama 3 of this shape is."""
    heads = Columns(unit=args.head_dim)
    return Plan(
        blocks=("layers.*",),
        embedding="tok_embeddings",
        head="output",
        tied=(("tok_embeddings.weight", "output.weight"),),
        tensor={
            "layers.*.attention_norm": Replicated(),
            "layers.*.attention": Gathered(),
            "layers.*.attention.wq": heads,
            "layers.*.attention.wk": heads,
            "layers.*.attention.wv": heads,
            "layers.*.attention.wo": Rows(unit=args.head_dim),
            "layers.*.ffn_norm": Replicated(),
            "layers.*.feed_forward": Gathered(),
            "layers.*.feed_forward.w1": Columns(),
            "layers.*.feed_forward.w3": Columns(),
            "layers.*.feed_forward.w2": Rows(),
            "norm": Replicated(),
        },
        attention=("layers.*.attention.inner",),
        mask="mask",
        order=ORDER,
    )


def parallelize_llama3(model: nn.Module, dims: ParallelDims, job: JobConfig, dtype: torch.dtype) -> nn.Module:
    """The model, or a pipeline stage of it, laid out over the mesh; `dtype` is the type of compute."""
    return parallelize(model, llama3_plan(cast(Llama3, model).args), dims, job, dtype)


def pipeline_llama3(model: nn.Module, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This rank's pipeline stages of a whole model on the meta device."""
    return split(model, llama3_plan(cast(Llama3, model).args), dims, job)
