"""Qwen3's TrainSpec; imported by the registry once the model is needed."""

from collections.abc import Sequence

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.layers.moe import SelectionBias
from components.optim.optimizers import Optimizers
from models.qwen3.args import FLAVORS, Qwen3Args
from models.qwen3.hf import ADAPTER
from models.qwen3.model import Qwen3
from models.qwen3.parallelize import parallelize_qwen3, pipeline_qwen3
from models.train_spec import TrainSpec, build_default_optimizers


def load() -> TrainSpec:
    """The family's TrainSpec: its model, flavors and plan, and the optimizer that also moves selection biases."""
    return TrainSpec(
        model_cls=Qwen3,
        model_args=FLAVORS,
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_qwen3,
        args_for_job_fn=Qwen3Args.for_job,
        inputs=("positions", "document_ids", "shares"),
        build_optimizers_fn=build_optimizers,
        state_dict_adapter=ADAPTER,
    )


def build_optimizers(parts: Sequence[nn.Module], job: JobConfig, device: torch.device) -> Optimizers:
    """The default optimizer, followed by the selection biases."""
    optimizers = build_default_optimizers(parts, job, device)
    optimizers.follow(SelectionBias(parts))
    return optimizers
