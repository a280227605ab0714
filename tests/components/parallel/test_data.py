"""Every data-parallel layout computes what one plain process computes: losses and each parameter's gradient."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

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
    reshard: Any = "default"
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


def _sharded(case: Case, dims: ParallelDims) -> Any:
    model = make(tied=case.tied)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if case.meta:
        model = model.to("meta")
        if case.tied:
            model.output.weight = model.tok_embeddings.weight
    parallelism = Parallelism(fsdp_reshard_after_forward=case.reshard)
    shard(model, replace(PLAN, fp32=case.fp32), dims, parallelism, getattr(torch, case.compute), case.offload)
    if case.meta:
        model.to_empty(device="cpu")
        set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    return model


def _ranks(cases: list[Case]) -> list[tuple[list[float], dict[str, Tensor], bool]]:
    """For each case: losses, gradients, and whether evaluation left every parameter sharded."""
    dims, found = ParallelDims.build(cases[0].degrees, "cpu"), []
    for case in cases:
        model = _sharded(case, dims)
        losses, grads = _train(model, case, dims.data_rank, dims.data_degree)
        found.append((losses, grads, all(isinstance(parameter, DTensor) for parameter in model.parameters())))
    return found


def _check(cases: list[Case]) -> None:
    found = run_ranks(cases[0].degrees.world, _ranks, cases)
    for i, case in enumerate(cases):
        tolerance = 1e-5 if case.compute == "float32" else 0.03
        expected_losses, expected = _train(make(tied=case.tied), replace(case, microbatches=1), 0, 1)
        for losses, grads, sharded in (rank[i] for rank in found):
            assert sharded, case
            assert losses == pytest.approx(expected_losses, rel=tolerance, abs=0), case
            assert list(grads) == list(expected)
            off = {n: ((grads[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items()}
            assert {n: bound for n, bound in off.items() if bound > tolerance} == {}, case


DDP2, DDP4 = Degrees(dp_replicate=2), Degrees(dp_replicate=4)
FSDP2, FSDP4 = Degrees(dp_shard=2), Degrees(dp_shard=4)
HSDP = Degrees(dp_replicate=2, dp_shard=2)
IDS = ["ddp2", "ddp4", "fsdp2", "fsdp4", "hsdp"]


@pytest.mark.parametrize("degrees", [DDP2, DDP4, FSDP2, FSDP4, HSDP], ids=IDS)
def test_layouts(degrees: Degrees) -> None:
    _check([Case(degrees), Case(degrees, chunked=True), Case(degrees, microbatches=3)])


@pytest.mark.parametrize("degrees", [DDP2, FSDP2, HSDP], ids=["ddp2", "fsdp2", "hsdp"])
def test_tied(degrees: Degrees) -> None:
    case = Case(degrees, tied=True)
    _check([case, replace(case, chunked=True), replace(case, microbatches=3), replace(case, meta=True)])


def test_reshard_policies() -> None:
    _check([Case(FSDP2, reshard=reshard, tied=tied) for reshard in ("always", "never") for tied in (False, True)])


def test_offload_and_meta() -> None:
    _check([Case(HSDP, offload=True), Case(HSDP, offload=True, tied=True), Case(HSDP, meta=True)])


@pytest.mark.parametrize("degrees", [Degrees(), DDP2, FSDP2, HSDP], ids=["one", "ddp2", "fsdp2", "hsdp"])
def test_mixed_precision(degrees: Degrees) -> None:
    case = Case(degrees, compute="bfloat16")
    _check([case, replace(case, tied=True, microbatches=3), replace(case, fp32=("layers.*.gate", "norm"))])


def _dtypes(compute: str) -> dict[str, torch.dtype]:
    """Types that modules see in forward, and of what is kept and updated."""
    case = Case(Degrees(), compute=compute, fp32=("layers.*.gate",))
    model = _sharded(case, ParallelDims.build(case.degrees, "cpu"))
    seen: dict[str, torch.dtype] = {}
    for name in ("tok_embeddings", "layers.1.wo", "layers.1.gate", "norm", "output"):
        model.get_submodule(name).register_forward_pre_hook(_see(seen, name))
    _step(model, case, 0, 1)
    parameter = model.get_parameter("layers.1.wo.weight")
    return seen | {"parameter": parameter.dtype, "gradient": gradients(model)["layers.1.wo.weight"].dtype}


def _see(seen: dict[str, torch.dtype], name: str) -> Any:
    def hook(module: Any, args: Any) -> None:
        seen[name] = module.weight.dtype

    return hook


def test_mixed_precision_types() -> None:
    half, full = torch.bfloat16, torch.float32
    assert run_ranks(1, _dtypes, "bfloat16")[0] == {
        "tok_embeddings": half,
        "layers.1.wo": half,
        "layers.1.gate": full,
        "norm": half,
        "output": half,
        "parameter": full,
        "gradient": full,
    }


def _communication(degrees: Degrees) -> list[dict[str, int]]:
    """Collectives of each of three microbatches' backward passes."""
    case = Case(degrees, reshard="never")
    dims = ParallelDims.build(degrees, "cpu")
    model, counts = _sharded(case, dims), []
    for i in range(3):
        loss = loss_sum(model, *batch(2), chunked=False)
        set_gradient_sync(model, i == 2)
        with CommDebugMode() as mode:
            loss.backward()
        counts.append({op.__name__: n for op, n in mode.get_comm_counts().items()})
    return counts


# Six units: embedding, three blocks, head, root.
@pytest.mark.parametrize(
    ("degrees", "before", "last"),
    [
        (DDP2, {}, {"allreduce_": 6}),
        (FSDP2, {"_reduce_scatter_base_": 6}, {"_reduce_scatter_base_": 6}),
        (HSDP, {"_reduce_scatter_base_": 6}, {"_reduce_scatter_base_": 6, "allreduce_": 6}),
    ],
    ids=["ddp", "fsdp", "hsdp"],
)
def test_communication_of_accumulation(degrees: Degrees, before: dict[str, int], last: dict[str, int]) -> None:
    assert run_ranks(degrees.world, _communication, degrees)[0] == [before, before, last]


def test_who_needs_a_process_group() -> None:
    full, half = torch.float32, torch.bfloat16
    assert not needs_process_group(Degrees(), full, full, cpu_offload=False)
    assert not needs_process_group(Degrees(), half, half, cpu_offload=False)
    assert needs_process_group(Degrees(), full, half, cpu_offload=False)
    assert needs_process_group(Degrees(), full, full, cpu_offload=True)
    assert needs_process_group(DDP2, full, full, cpu_offload=False)


def test_nothing_happens_without_a_process_group() -> None:
    model = make()
    shard(model, PLAN, ParallelDims.build(Degrees(), "cpu"), Parallelism(), torch.float32)
    set_gradient_sync(model, True)
    assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}
