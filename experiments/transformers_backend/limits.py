"""What a model of transformers cannot do in a layout, as lines of a job's problems."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from components.config.job_config import JobConfig
from components.mesh.plan import Columns, Rows, Style
from components.parallel.modules import find
from components.parallel.pipeline_cut import cut_problems
from experiments.transformers_backend.args import HFArgs
from experiments.transformers_backend.model import HFModel
from experiments.transformers_backend.plan import tensor_styles
from models.limits import length_problems, tensor_problems


def problems(args: HFArgs, job: JobConfig) -> Iterator[str]:
    """Why the model cannot run that job. Raises ConfigError for a model that cannot be trained at all."""
    anatomy, parallelism = args.anatomy, job.parallelism
    for key, why in {
        "context_parallel_degree": "attention of transformers' models cannot be cut along the sequence",
        "expert_parallel_degree": "experts of transformers' models cannot be dealt out",
        "expert_tensor_parallel_degree": "experts of transformers' models cannot be cut",
    }.items():
        if (degree := getattr(parallelism, key)) > 1:
            yield f"parallelism.{key} = {degree}: {why}; set it to 1"
    if job.moe.balance_coefficient is not None or job.moe.bias_rate is not None:
        key = "balance_coefficient" if job.moe.balance_coefficient is not None else "bias_rate"
        yield f"moe.{key} = {getattr(job.moe, key):g}: transformers' routers are not balanced here; leave it out"
    if job.comm.mode == "local_tensor":
        yield 'comm.mode = "local_tensor": transformers\' models run in processes of their own only; take "default"'
    yield from _tensor(args, job)
    if parallelism.pipeline_parallel_degree > 1 and anatomy.uncut:
        key = f"parallelism.pipeline_parallel_degree = {parallelism.pipeline_parallel_degree}"
        yield f"{key}: {anatomy.uncut}; set it to 1"
    else:
        yield from cut_problems(parallelism, anatomy.order, len(anatomy.layers))
    if anatomy.longest is not None:
        yield from length_problems(job, anatomy.longest)


def _tensor(args: HFArgs, job: JobConfig) -> Iterator[str]:
    degree = job.parallelism.tensor_parallel_degree
    if degree == 1:
        return
    with torch.device("meta"):
        model = HFModel(args)
        styles, reasons = tensor_styles(model)
        heads = {(layer.heads, layer.kv_heads) for layer in args.anatomy.layers}
        undealt = [line for layer in sorted(heads) for line in tensor_problems(job, *layer)]
        if not reasons and not undealt:
            reasons = list(_with_pieces(model, styles, degree))
    for reason in reasons:
        yield f"parallelism.tensor_parallel_degree = {degree}: {reason}; set it to 1"
    yield from undealt


def _with_pieces(model: HFModel, styles: Mapping[str, Style], degree: int) -> Iterator[str]:
    """Why their code cannot compute with a piece of the heads and features, found by letting it; nothing if it can."""
    for pattern, style in styles.items():
        for module in find(model, (pattern,)).values():
            if isinstance(style, Columns) and isinstance(module, nn.Linear):
                module.forward = _giving(max(_share(module.out_features, style.unit, degree), style.unit))
            elif isinstance(style, Rows) and isinstance(module, nn.Linear):
                module.forward = _taking(_share(module.in_features, style.unit, degree), module.out_features)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    try:
        model(tokens, positions=tokens)
    except Exception as error:  # their code, which may count on whatever it likes
        yield f"the code of {type(model.model).__name__} counts on all heads and features ({error})"


def _share(features: int, unit: int, degree: int) -> int:
    """The first rank's features."""
    return features // degree if unit > 1 else -(-features // degree)


def _giving(features: int) -> Callable[..., Any]:
    return lambda x: x.new_empty(*x.shape[:-1], features)


def _taking(features: int, out: int) -> Callable[..., Any]:
    def forward(x: Tensor) -> Tensor:
        if x.shape[-1] != features:
            raise ValueError(f"{x.shape[-1]} features instead of {features}")
        return x.new_empty(*x.shape[:-1], out)

    return forward
