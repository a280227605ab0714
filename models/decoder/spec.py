"""The TrainSpec of a family of decoders; imported by the registry once a model is needed."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from components.checkpoint.hf_config import Adapter
from components.config.job_config import JobConfig
from components.layers.moe import SelectionBias
from components.optim.optimizers import Optimizers
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.decoder.plan import parallelize_decoder, pipeline_decoder
from models.train_spec import TrainSpec, build_default_optimizers


def decoder_spec(flavors: Mapping[str, DecoderArgs], adapter: Adapter | None) -> TrainSpec:
    """The spec of these flavors, with what moves selection biases where there are any."""
    return TrainSpec(
        model_cls=Decoder,
        model_args=flavors,
        parallelize_fn=parallelize_decoder,
        pipelining_fn=pipeline_decoder,
        args_for_job_fn=DecoderArgs.for_job,
        inputs=("positions", "document_ids", "shares", "ahead", "ahead_shares"),
        build_optimizers_fn=build_optimizers,
        state_dict_adapter=adapter,
    )


def build_optimizers(parts: Sequence[nn.Module], job: JobConfig, device: torch.device) -> Optimizers:
    """The default optimizer, followed by the selection biases."""
    optimizers = build_default_optimizers(parts, job, device)
    optimizers.follow(SelectionBias(parts))
    return optimizers
