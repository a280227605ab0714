"""Weights of transformers' making, imported into four ranks: each layout gives the logits that transformers gives."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from models.decoder.args import DecoderArgs
from models.train_spec import families
from tests.models.families import FAMILIES
from tests.models.parity import adapter_of, require_close
from tests.ranks import run_ranks
from trainer.build import build_stages

LAYOUTS = {
    "fsdp × tp": Degrees(dp_shard=2, tp=2),
    "pp × fsdp": Degrees(pp=2, dp_shard=2),
    "ep × fsdp": Degrees(dp_shard=4, ep=2),
}
SEQ = 24


def shape(family: str, with_experts: bool) -> DecoderArgs | None:
    """The first drawn shape with heads for two ranks and an even number of experts; None: the family has no experts."""
    for seed in range(40):
        args = FAMILIES[family].draw(random.Random(f"layouts {family} {seed}"))
        experts = next((block.experts for block in args.blocks if block.experts), None)
        if with_experts <= (experts is not None) and args.n_kv_heads != 3:
            return args if experts is None else replace(args, experts=replace(experts, count=4))
    return None


def logits(path: str, family: str, args: DecoderArgs, degrees: Degrees, tokens: Tensor) -> Tensor | None:
    """Of all tokens, on the ranks that have the head; None on others."""
    job = JobConfig()
    parallelism = replace(
        job.parallelism,
        pipeline_parallel_degree=degrees.pp,
        disable_loss_parallel=True,
        tensor_parallel_degree=degrees.tp,
    )
    job = replace(job, parallelism=parallelism)
    dims = ParallelDims.build(degrees, "cpu")
    spec = families.lookup(family).load()
    stages = build_stages(spec, args, job, dims, torch.device("cpu"), torch.float32, seed=9)
    load_hf(path, model_tensors([stage.module for stage in stages]), adapter_of(family), args, Ranks(dist.group.WORLD))
    positions, (stage,) = torch.arange(SEQ).expand(tokens.shape), stages
    model: Any = stage.module
    with torch.no_grad():
        if stage.first:
            x = tokens
        else:
            x = torch.empty(*tokens.shape, args.dim)
            dist.recv(x, group=dims.group("pp"), group_src=0)
        hidden = model(x, positions)
        if stage.last:
            return model.output(hidden)
        dist.send(hidden.contiguous(), group=dims.group("pp"), group_dst=1)
        return None


TRIED = [(family, name) for family in FAMILIES for name in LAYOUTS if shape(family, with_experts="ep" in name)]


@pytest.mark.parametrize(("family", "layout"), TRIED)
def test_logits_are_transformers(family: str, layout: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    args = shape(family, with_experts="ep" in layout)
    assert args is not None
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes(adapter_of(family).config_bytes(args, "float32"))
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tmp_path / "config")
    twin = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=FAMILIES[family].attention, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    tokens = torch.randint(0, args.vocab_size, (2, SEQ))
    with torch.no_grad():
        want = twin(input_ids=tokens, use_cache=False).logits
    found = run_ranks(4, logits, str(tmp_path / "theirs"), family, args, LAYOUTS[layout], tokens)
    have = [each for each in found if each is not None]
    assert len(have) == 4 // LAYOUTS[layout].pp
    for each in have:
        require_close("logits", each, want, 1e-5)
