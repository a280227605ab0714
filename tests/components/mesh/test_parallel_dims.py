"""ParallelDims: who is with whom in each view, on real groups, on none, and on many fake ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.runtime.errors import MeshError
from tests.ranks import run_ranks

NAMES = ("batch", "loss", "dp_replicate", "fsdp", "tp", "pp", "cp", "efsdp", "ep", "etp")


def _members(degrees: Degrees) -> dict[str, Any]:
    """Ranks of each group, found by communicating, and the data rank."""
    dims = ParallelDims.build(degrees, "cpu")
    found: dict[str, Any] = {"data": (dims.data_rank, dims.data_degree)}
    for name in NAMES:
        group = dims.group(name)
        if group is not None:
            ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
            dist.all_gather(ranks, torch.tensor([dist.get_rank()]), group=group)
            found[name] = [int(rank) for rank in ranks]
    return found


def test_hsdp_with_tensor_parallelism() -> None:
    found = run_ranks(8, _members, Degrees(dp_replicate=2, dp_shard=2, tp=2))
    rank = found[5]  # pipeline 0, replica 1, shard 0, tensor 1
    assert rank == {
        "data": (2, 4),
        "batch": [1, 3, 5, 7],
        "loss": [1, 3, 5, 7],
        "dp_replicate": [1, 5],
        "fsdp": [5, 7],
        "tp": [4, 5],
        "efsdp": [4, 5, 6, 7],
    }


def test_context_and_expert_parallelism() -> None:
    found = run_ranks(8, _members, Degrees(dp_shard=2, cp=2, pp=2, ep=2))
    assert found[6] == {
        "data": (1, 2),
        "batch": [4, 6],
        "loss": [4, 5, 6, 7],
        "fsdp": [4, 5, 6, 7],
        "pp": [2, 6],
        "cp": [6, 7],
        "efsdp": [4, 6],
        "ep": [6, 7],
    }


def test_context_parallelism_alone_is_the_loss_mesh() -> None:
    assert run_ranks(2, _members, Degrees(cp=2))[0] == {
        "data": (0, 1),
        "loss": [0, 1],
        "fsdp": [0, 1],
        "cp": [0, 1],
    }


def test_one_process_needs_no_process_group() -> None:
    dims = ParallelDims.build(Degrees(), "cpu")
    assert [dims.mesh(name) for name in NAMES] == [None] * len(NAMES)
    assert (dims.parameter_mesh(), dims.group("loss"), dims.data_rank, dims.data_degree) == (None, None, 0, 1)


def _parameter_mesh(degrees: Degrees) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    mesh = ParallelDims.build(degrees, "cpu").parameter_mesh()
    return (mesh.mesh_dim_names, tuple(mesh.shape)) if mesh is not None else (None, ())


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (Degrees(), (("fsdp",), (1,))),
        (Degrees(tp=2), (("fsdp",), (1,))),
        (Degrees(dp_shard=2), (("fsdp",), (2,))),
        (Degrees(dp_replicate=2), (("dp_replicate", "fsdp"), (2, 1))),
    ],
)
def test_parameters_always_have_a_mesh(degrees: Degrees, expected: Any) -> None:
    assert run_ranks(degrees.world, _parameter_mesh, degrees)[0] == expected


def test_dimensions_of_different_views() -> None:
    with pytest.raises(MeshError) as error:
        ParallelDims.build(Degrees(), "cpu").mesh("batch", "tp")
    assert str(error.value) == (
        "no mesh has batch and tp: allowed together: batch, cp; loss; pp, dp_replicate, fsdp, tp; dp_replicate, efsdp,"
        " ep, etp"
    )


def test_another_number_of_ranks() -> None:
    with pytest.raises(MeshError, match="the degrees make 2 ranks, but 1 are connected"):
        ParallelDims.build(Degrees(dp_shard=2), "cpu")


def _fake(degrees: Degrees, rank: int) -> tuple[Any, ...]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=degrees.world, store=FakeStore())
    dims = ParallelDims.build(degrees, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        meshes = {name: dims.mesh(name) for name in ("loss", "dp_replicate", "fsdp", "tp", "pp")}
        return dims.data_rank, {name: (m.size(), m.get_local_rank()) for name, m in meshes.items() if m is not None}


@pytest.mark.parametrize("world", [64, 16384])
def test_fake_ranks_in_fake_tensor_mode(world: int) -> None:
    degrees = Degrees(dp_replicate=2, dp_shard=world // 64, tp=8, pp=4)
    rank = world // 2 + 9  # pipeline 2, replica 0, shard 1 (or, with one shard, replica 1), tensor 1
    data, found = run_ranks(1, _fake, degrees, rank, backend=None)[0]
    batch = world // 32
    fsdp = {"fsdp": (world // 64, 1)} if world > 64 else {}
    replica = 0 if world > 64 else 1
    assert data == 1
    assert found == {"loss": (batch, 1), "dp_replicate": (2, replica), **fsdp, "tp": (8, 1), "pp": (4, 2)}


def _coordinates_of_all_ranks(degrees: Degrees) -> tuple[bool, list[list[int]]]:
    """In one process; meshes of this mode are asked for again and again, as training steps do."""
    from torch.distributed._local_tensor import LocalTensorMode  # no public name yet

    from components.runtime import distributed

    distributed.init_fake(degrees.world)
    mode = LocalTensorMode(degrees.world)
    found: list[list[int]] = []
    with mode:
        dims = ParallelDims.build(degrees, "cpu")
        for name in ("cp", "tp", "fsdp") * 50:
            axis = dims.axis(name)
            rank: Any = axis.rank if axis else None
            found.append([rank.node._local_ints[r] for r in range(degrees.world)])  # there is no public way to read it
        return dims.mesh("tp") is dims.mesh("tp"), found


def test_meshes_are_told_apart_with_all_ranks_in_one_process() -> None:
    same, found = run_ranks(1, _coordinates_of_all_ranks, Degrees(cp=2, tp=2), backend=None)[0]
    assert same
    cp, tp = [0, 0, 1, 1], [0, 1, 0, 1]
    assert found == [cp, tp, cp] * 50
