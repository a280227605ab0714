"""Llama 3 laid out over ranks by its own plan computes what it computes alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from models.llama3.args import FLAVORS, Llama3Args
from models.llama3.spec import load
from models.train_spec import families
from tests.ranks import run_ranks
from trainer.build import build_stages

ARGS = Llama3Args(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, vocab_size=65)
ROWS, SEQ = 4, 16


def _step(args: Llama3Args, degrees: Degrees) -> dict[str, Any]:
    """Loss and gradients of one step over all rows, each rank taking its own."""
    dims = ParallelDims.build(degrees, "cpu")
    model: Any = build_stages(load(), args, JobConfig(), dims, torch.device("cpu"), torch.float32, seed=3)[0].module
    data = torch.randint(0, args.vocab_size, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    mine = data[dims.data_rank :: dims.data_degree]
    hidden = model(mine[:, :-1], torch.arange(SEQ).expand(len(mine), SEQ), None)
    loss = F.cross_entropy(model.output(hidden).flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / (ROWS * SEQ)
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    found = {"loss": total}
    for name, parameter in model.named_parameters():
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("degrees", [Degrees(dp_shard=2), Degrees(dp_replicate=2), Degrees(dp_replicate=2, dp_shard=2)])
def test_layouts_agree(tied: bool, degrees: Degrees) -> None:
    args = replace(ARGS, tied_embeddings=tied)
    expected = _step(args, Degrees())
    for found in run_ranks(degrees.world, _step, args, degrees):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_the_registry_leads_here() -> None:
    spec = families["llama3"].load()
    assert spec.model_args is FLAVORS
    assert spec.pipelining_fn is not None
