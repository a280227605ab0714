"""What a model of transformers cannot do in a layout, as lines of a job's problems."""

from collections.abc import Iterator

import torch

from components.config.job_config import JobConfig
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
        _, reasons = tensor_styles(HFModel(args))
    for reason in reasons:
        yield f"parallelism.tensor_parallel_degree = {degree}: {reason}; set it to 1"
    for layer in dict.fromkeys((layer.heads, layer.kv_heads) for layer in args.anatomy.layers):
        yield from tensor_problems(job, *layer)
