"""Checkpoints that several ranks write and other numbers of ranks read, and what happens when one of them fails."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors, optimizer_tensors
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, STATE
from tests.ranks import run_ranks
from tests.whole import whole


def build(seed: int) -> dict[str, torch.Tensor]:
    """A model with uneven and empty shards, and optimizer state for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    moments = {f"{name}.exp_avg": parameter.detach() * 3 for name, parameter in model.named_parameters()}
    steps = {f"{name}.step": torch.tensor(float(seed)) for name, _ in model.named_parameters()}
    return {**model_tensors([model]), **optimizer_tensors({**moments, **steps})}


def full(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    values = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}
    return {k: v.detach().tolist() for k, v in values.items()}


def checkpointer(root: str) -> Checkpointer:
    return Checkpointer(Path(root), keep_latest_k=2, group=dist.group.WORLD if dist.is_initialized() else None)


def write(root: str, seed: int) -> dict[str, list]:
    tensors = build(seed)
    checkpointer(root).save(3, tensors, STATE, JOB)
    return full(tensors)


def read(root: str) -> tuple[dict[str, list], Any]:
    tensors = build(99)
    run = checkpointer(root)
    step = run.resolve(-1)
    state = run.load(step or 0, tensors, job=JOB)
    return full(tensors), state


@pytest.mark.parametrize(("writers", "readers"), [(1, [2]), (2, [1, 4])])
def test_another_number_of_ranks_reads_the_same_bytes(tmp_path: Path, writers: int, readers: list[int]) -> None:
    root = str(tmp_path)
    written = run_ranks(writers, write, root, 1) if writers > 1 else [write(root, 1)]
    for ranks in readers:
        found = run_ranks(ranks, read, root) if ranks > 1 else [read(root)]
        assert found == [(written[0], STATE)] * ranks
    files = {f"__{rank}_0.distcp" for rank in range(writers)}
    assert set(os.listdir(tmp_path / "step-3")) == {".metadata", "manifest.json", "state.json", "tensors.json", *files}


def cut_twice(root: str, degrees: Degrees, saves: bool) -> dict[str, list]:
    """Save or load tensors of odd sizes that tensor parallelism cuts first and FSDP2 then; their values, whole."""
    dims, module = ParallelDims.build(degrees, "cpu"), nn.Module()
    for size in (3, 5, 7, 9, 10, 13):
        numbers = torch.arange(4.0 * size) if saves else torch.zeros(4 * size)
        for name, shape, dim in (("rows", (size, 4), 0), ("columns", (4, size), 1)):
            tensor = numbers.view(shape)
            if mesh := dims.mesh("tp"):
                tensor = distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)
            module.register_parameter(f"{name}{size}", nn.Parameter(tensor))
    if fsdp := dims.parameter_mesh():
        fully_shard(module, mesh=fsdp)
    tensors = model_tensors([module])
    run = checkpointer(root)
    if saves:
        run.save(1, tensors, STATE, JOB)
    else:
        run.load(run.resolve(-1) or 0, tensors, job=JOB)
    return {name: whole(value).tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("degrees", [Degrees(dp_shard=3, tp=2), Degrees(dp_shard=2, tp=3), Degrees(tp=4)])
def test_unevenly_cut_by_rows_and_columns(tmp_path: Path, degrees: Degrees) -> None:
    root = str(tmp_path)
    written, *_ = run_ranks(degrees.world, cut_twice, root, degrees, True)
    assert written["model.rows7"] == torch.arange(28.0).view(7, 4).tolist()
    assert cut_twice(root, Degrees(), False) == written
    for other in (degrees, Degrees(dp_shard=2)):
        assert run_ranks(other.world, cut_twice, root, other, False) == [written] * other.world


def attempt(fn: Any) -> str:
    try:
        fn()
    except CheckpointError as error:
        return str(error)
    return "nothing went wrong"


def failures(root: str) -> list[str]:
    """One rank fails in each phase; the error that this rank sees."""
    from components.checkpoint.local import LocalFolder

    tensors = build(1)
    run, rank = checkpointer(root), dist.get_rank()
    run.save(1, tensors, STATE, JOB)
    texts = [attempt(lambda: run.save(2, tensors, {"train_state": {"rank": rank}}, JOB))]

    def fail(*_: Any) -> list[str]:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(LocalFolder, "create", fail)
        texts.append(attempt(lambda: run.save(2, tensors, STATE, JOB)))
    wrong = {**tensors, "model.0.weight": torch.zeros(1)} if rank else tensors
    texts.append(attempt(lambda: run.load(1, wrong, job=JOB)))
    texts.append(",".join(map(str, run.steps())) + " " + ",".join(sorted(os.listdir(root))))
    dist.barrier()
    if rank == 0:
        path = Path(root) / "step-1" / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    dist.barrier()
    texts.append(attempt(lambda: run.resolve(1)))
    return texts


def test_all_ranks_see_the_same_error(tmp_path: Path) -> None:
    first, second = run_ranks(2, failures, str(tmp_path))
    assert first == second
    size = (tmp_path / "step-1" / "__1_0.distcp").stat().st_size
    assert first == [
        f"cannot save step-2 in '{tmp_path}': the state of train_state differs between ranks",
        f"cannot save step-2 in '{tmp_path}': rank 1: Input/output error",
        "checkpoint step-1 does not fit: rank 1: model.0.weight: shape [5, 6] saved, [1] here",
        "1 step-1",
        f"checkpoint.load_step = 1: checkpoint step-1 is broken: __1_0.distcp: bytes 0 to {size} have changed; "
        f"valid in '{tmp_path}': step-1",
    ]


def stages(root: str) -> list[str]:
    """Each rank has a stage of its own, with other names."""
    rank = dist.get_rank()
    tensors = {f"model.{rank}.w": torch.full((2,), rank + 1.0), "model.shared": torch.ones(1)}
    run = checkpointer(root)
    run.save(1, tensors, STATE, JOB)
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    run.load(1, found, job=JOB)
    del found["model.shared"]
    return [str(full(found)), attempt(lambda: run.load(1, found, job=JOB))]


def test_ranks_with_different_tensors_are_one_checkpoint(tmp_path: Path) -> None:
    message = "checkpoint step-1 does not fit: not expected here: model.shared"
    assert run_ranks(2, stages, str(tmp_path)) == [
        ["{'model.0.w': [1.0, 1.0]}", message],
        ["{'model.1.w': [2.0, 2.0]}", message],
    ]


def flags() -> list[list[bool]]:
    ranks = Ranks(dist.group.WORLD)
    return [ranks.any_of([ranks.rank == 0, ranks.rank == 1, False]), ranks.any_of([])]


def test_what_any_rank_has() -> None:
    assert run_ranks(2, flags) == [[[True, True, False], []]] * 2
