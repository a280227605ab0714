"""How the decoder is laid out: what the model is, as a Plan, and one call to the applier that all models share."""

from typing import cast

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan, Replicated, Style
from components.parallel.apply import parallelize
from components.parallel.pipeline import Stage, split
from models.decoder.args import ORDER, DecoderArgs
from models.decoder.model import Decoder

AHEAD = "mtp.*.block"
"""The blocks of multi-token prediction."""


def decoder_plan(args: DecoderArgs) -> Plan:
    """What a decoder of this shape is. Blocks may differ: a style then speaks of those that have the module."""
    tensor: dict[str, Style] = {"norm": Replicated()}
    places = {"layers.*": args.blocks, **({AHEAD: args.ahead} if args.mtp_layers else {})}
    for within, shape in dict.fromkeys((within, shape) for within, shapes in places.items() for shape in shapes):
        parts = {"attention": shape.attention, "moe" if shape.experts else "feed_forward": shape.feed_forward}
        norms = ("attention_norm", "ffn_norm", *(("attention_post_norm", "ffn_post_norm") if shape.sandwich else ()))
        tensor |= {f"{within}.{name}": Replicated() for name in norms}
        for part, layer in parts.items():
            tensor |= {f"{within}.{part}.{name}".rstrip("."): style for name, style in layer.styles().items()}
    if args.mtp_layers:  # its own matrix works on single tokens, of which each rank has some
        tensor |= {f"mtp.*.{name}": Replicated() for name in ("enorm", "hnorm", "eh_proj")}
        tensor["mtp_norms.*"] = Replicated()
    return Plan(
        blocks=("layers.*", "mtp.*") if args.mtp_layers else ("layers.*",),
        embedding="tok_embeddings",
        head="output",
        tied=(("tok_embeddings.weight", "output.weight"),),
        tensor=tensor,
        attention=tuple(f"{within}.attention.inner" for within in places),
        mask="masks.*",
        experts=tuple(f"{within}.moe" for within, shapes in places.items() if any(shape.experts for shape in shapes)),
        order=ORDER,
        beside={"output": ("mtp", "mtp_norms", "tok_embeddings")} if args.mtp_layers else {},
    )


def parallelize_decoder(model: nn.Module, dims: ParallelDims, job: JobConfig, dtype: torch.dtype) -> nn.Module:
    """The model, or a pipeline stage of it, laid out over the mesh; `dtype` is the type of compute."""
    return parallelize(model, decoder_plan(cast(Decoder, model).args), dims, job, dtype)


def pipeline_decoder(model: nn.Module, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This rank's pipeline stages of a whole model on the meta device."""
    return split(model, decoder_plan(cast(Decoder, model).args), dims, job)
