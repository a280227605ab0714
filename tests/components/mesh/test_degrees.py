"""Degrees: what they derive, and the text of every refusal."""

import subprocess
import sys

import pytest

from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees, resolve_degrees
from components.runtime.errors import MeshError


def _parallelism(
    replicate: int = 1, shard: int = -1, cp: int = 1, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1
) -> Parallelism:
    return Parallelism(
        data_parallel_replicate_degree=replicate,
        data_parallel_shard_degree=shard,
        context_parallel_degree=cp,
        tensor_parallel_degree=tp,
        pipeline_parallel_degree=pp,
        expert_parallel_degree=ep,
        expert_tensor_parallel_degree=etp,
    )


def test_derived_degrees() -> None:
    degrees = resolve_degrees(_parallelism(replicate=2, shard=4, cp=2, tp=4, pp=3, ep=8, etp=1), 192)
    assert degrees == Degrees(dp_replicate=2, dp_shard=4, cp=2, tp=4, pp=3, ep=8, etp=1)
    assert (degrees.world, degrees.batch, degrees.fsdp, degrees.efsdp, degrees.loss) == (192, 8, 8, 4, 16)


def test_as_text() -> None:
    assert str(Degrees(dp_shard=2)) == "1 replicated × 2 sharded"
    assert str(Degrees(cp=2, tp=4, pp=3)) == "1 replicated × 1 sharded × 2 context × 4 tensor × 3 pipeline"
    assert str(Degrees(dp_replicate=2, dp_shard=4, tp=2, ep=2, etp=2)) == (
        "2 replicated × 4 sharded × 2 tensor; experts 2 sharded × 2 expert × 2 expert tensor"
    )


@pytest.mark.parametrize(
    ("replicate", "tp", "world", "shard"), [(1, 1, 1, 1), (1, 1, 8, 8), (2, 1, 8, 4), (2, 2, 8, 2), (8, 1, 8, 1)]
)
def test_shard_takes_what_is_left(replicate: int, tp: int, world: int, shard: int) -> None:
    assert resolve_degrees(_parallelism(replicate=replicate, tp=tp), world).dp_shard == shard


REFUSED = [
    (
        _parallelism(replicate=2, shard=3),
        4,
        "2 (replicate) × 3 (shard) × 1 (context) × 1 (tensor) × 1 (pipeline) = 6 ranks, but there are 4: "
        "set `parallelism.data_parallel_shard_degree` to 2 (or to -1: all that are left), or start 6 ranks",
    ),
    (
        _parallelism(replicate=3, shard=1),
        4,
        "3 (replicate) × 1 (shard) × 1 (context) × 1 (tensor) × 1 (pipeline) = 3 ranks, but there are 4: "
        "start 3 ranks, or choose degrees whose product is 4",
    ),
    (
        _parallelism(tp=3, pp=2),
        4,
        "1 (replicate) × 1 (context) × 3 (tensor) × 2 (pipeline) = 6 ranks, which does not divide the 4 that there "
        "are: start a multiple of 6 ranks, or lower one of these degrees",
    ),
    (
        _parallelism(tp=4, etp=2),
        8,
        "`parallelism.expert_tensor_parallel_degree` = 2 is neither 1 nor the tensor-parallel degree 4: "
        "set it to 1 or 4",
    ),
    (
        _parallelism(etp=2),
        8,
        "`parallelism.expert_tensor_parallel_degree` = 2 is neither 1 nor the tensor-parallel degree 1: set it to 1",
    ),
    (
        _parallelism(replicate=2, cp=2, tp=2, ep=4, etp=2),
        8,
        "4 (expert) × 2 (expert tensor) = 8 does not divide the 1 (shard) × 2 (context) × 2 (tensor) = 4 ranks that "
        "experts are dealt to: set `parallelism.expert_parallel_degree` to a divisor of 2",
    ),
]


@pytest.mark.parametrize(("parallelism", "world", "message"), REFUSED)
def test_refusals_say_the_numbers_and_the_mend(parallelism: Parallelism, world: int, message: str) -> None:
    with pytest.raises(MeshError) as error:
        resolve_degrees(parallelism, world)
    assert str(error.value) == message


def test_torch_is_not_imported() -> None:
    code = "import sys, components.mesh.degrees, components.mesh.plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
