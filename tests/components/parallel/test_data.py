"""Every data-parallel layout computes what one plain process computes: losses and each parameter's gradient."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.data import needs_process_group, set_gradient_sync, shard
from tests.components.parallel.tiny import PLAN, batch, gradients, loss_sum, make
from tests.ranks import run_ranks

ROWS = 12


@dataclass(frozen=True)
class Case:
    degrees: Degrees
    reshard: str = "default"
    tied: bool = False
    chunked: bool = False
    offload: bool = False
    microbatches: int = 1
    compute: str = "float32"
    fp32: tuple[str, ...] = ()
    meta: bool = False


def _step(model: Any, case: Case, rank: int, ranks: int) -> float:
    """Forward and backward of this rank's rows; the step's loss over all ranks."""
    tokens, labels = (x[rank::ranks] for x in batch(ROWS))
    valid = (batch(ROWS)[1] >= 0).sum()
    total = torch.zeros(())
    pieces = list(zip(tokens.chunk(case.microbatches), labels.chunk(case.microbatches), strict=True))
    for i, (x, y) in enumerate(pieces):
        loss = loss_sum(model, x, y, case.chunked) / valid
        set_gradient_sync(model, i == len(pieces) - 1)
        loss.backward()
        total += loss.detach()
    if ranks > 1:
        dist.all_reduce(total)
    return total.item()


def _train(model: Any, case: Case, rank: int, ranks: int) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps with evaluation before, between and after; all losses, and the second step's gradients."""
    losses, optimizer = [], torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(2):
        with torch.no_grad():
            losses.append(loss_sum(model, *batch(ROWS), case.chunked).item())
        losses.append(_step(model, case, rank, ranks))
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        losses.append(loss_sum(model, *batch(ROWS), case.chunked).item())
    return losses, gradients(model)


def _ranks(case: Case) -> tuple[list[float], dict[str, Tensor], bool]:
    dims = ParallelDims.build(case.degrees, "cpu")
    model = make(tied=case.tied)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if case.meta:
        model = model.to("meta")
        if case.tied:
            model.output.weight = model.tok_embeddings.weight
    parallelism: Any = Parallelism(fsdp_reshard_after_forward=case.reshard)  # type: ignore[arg-type]
    plan = replace(PLAN, fp32=case.fp32)
    shard(model, plan, dims, parallelism, getattr(torch, case.compute), case.offload)
    if case.meta:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        model.to_empty(device="cpu")
        set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    losses, grads = _train(model, case, dims.data_rank, dims.data_degree)
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return losses, grads, sharded


def _check(case: Case, tolerance: float = 1e-5) -> None:
    expected_losses, expected = _train(make(tied=case.tied), replace(case, microbatches=1), 0, 1)
    for losses, grads, sharded in run_ranks(case.degrees.world, _ranks, case):
        assert sharded
        torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=0)
        assert list(grads) == list(expected)
        for name, grad in grads.items():
            bound = tolerance * expected[name].abs().max().item()
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


DDP2, DDP4 = Degrees(dp_replicate=2), Degrees(dp_replicate=4)
FSDP2, FSDP4 = Degrees(dp_shard=2), Degrees(dp_shard=4)
HSDP = Degrees(dp_replicate=2, dp_shard=2)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("degrees", [DDP2, DDP4, FSDP2, FSDP4, HSDP], ids=["ddp2", "ddp4", "fsdp2", "fsdp4", "hsdp"])
def test_layouts(degrees: Degrees, chunked: bool) -> None:
    _check(Case(degrees, chunked=chunked))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reshard", ["always", "never"])
def test_reshard_policies(reshard: str, tied: bool) -> None:
    _check(Case(FSDP2, reshard=reshard, tied=tied))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("degrees", [DDP2, FSDP2, HSDP], ids=["ddp", "fsdp", "hsdp"])
def test_tied(degrees: Degrees, meta: bool) -> None:
    _check(Case(degrees, tied=True, chunked=True, meta=meta))


@pytest.mark.parametrize("degrees", [FSDP4, HSDP], ids=["fsdp", "hsdp"])
def test_offload(degrees: Degrees) -> None:
    _check(Case(degrees, offload=True))


@pytest.mark.parametrize("degrees", [DDP2, FSDP2, HSDP], ids=["ddp", "fsdp", "hsdp"])
def test_accumulation(degrees: Degrees) -> None:
    _check(Case(degrees, microbatches=3))


@pytest.mark.parametrize("degrees", [Degrees(), DDP2, FSDP2, HSDP], ids=["one", "ddp", "fsdp", "hsdp"])
def test_mixed_precision(degrees: Degrees) -> None:
    _check(Case(degrees, compute="bfloat16", microbatches=3), tolerance=0.03)


def test_mixed_precision_with_fp32_modules() -> None:
    _check(Case(FSDP2, compute="bfloat16", fp32=("layers.*.gate", "norm")), tolerance=0.03)
