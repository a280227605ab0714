"""How Qwen3 is laid out: what the model is, as a Plan, and one call to the applier that all models share."""

from typing import cast

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns, Gathered, Plan, Replicated, Rows, Style
from components.parallel.apply import parallelize
from components.parallel.pipeline import Stage, split
from models.qwen3.args import ORDER, Qwen3Args
from models.qwen3.model import Qwen3


def qwen3_plan(args: Qwen3Args) -> Plan:
    """What a Qwen3 of this shape is."""
    heads = Columns(unit=args.head_dim)
    dense: dict[str, Style] = {
        "layers.*.feed_forward": Gathered(),
        "layers.*.feed_forward.w1": Columns(),
        "layers.*.feed_forward.w3": Columns(),
        "layers.*.feed_forward.w2": Rows(),
    }
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
            "layers.*.attention.q_norm": Replicated(),
            "layers.*.attention.k_norm": Replicated(),
            "layers.*.attention.wo": Rows(unit=args.head_dim),
            "layers.*.ffn_norm": Replicated(),
            **(dense if args.experts is None else {"layers.*.moe.router.gate": Replicated()}),
            "norm": Replicated(),
        },
        attention=("layers.*.attention.inner",),
        mask="mask",
        experts=("layers.*.moe",) if args.experts else (),
        order=ORDER,
    )


def parallelize_qwen3(model: nn.Module, dims: ParallelDims, job: JobConfig, dtype: torch.dtype) -> nn.Module:
    """The model, or a pipeline stage of it, laid out over the mesh; `dtype` is the type of compute."""
    return parallelize(model, qwen3_plan(cast(Qwen3, model).args), dims, job, dtype)


def pipeline_qwen3(model: nn.Module, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This rank's pipeline stages of a whole model on the meta device."""
    return split(model, qwen3_plan(cast(Qwen3, model).args), dims, job)
