"""parallelize: what it refuses, that names stay canonical, and that it needs neither real ranks nor real tensors."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.apply import parallelize
from components.parallel.modules import find
from components.runtime.errors import MeshError
from tests.components.parallel.tiny import DIM, PLAN, SEQ, VOCAB, Tiny, loss_sum, make
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            Degrees(tp=2),
            "parallelism.tensor_parallel_degree = 2: this model family has no plan for tensor parallelism: set it to 1",
        ),
    ],
)
def test_unplanned_degrees_are_refused(degrees: Degrees, message: str) -> None:
    with pytest.raises(MeshError) as error:
        parallelize(make(), PLAN, ParallelDims(degrees, 0, {}), JobConfig(), torch.float32)
    assert str(error.value) == message


def test_another_models_plan_is_refused() -> None:
    plan = Plan(blocks=("decoder.*",), embedding="embed", head="lm_head")
    with pytest.raises(MeshError) as error:
        parallelize(make(), plan, ParallelDims.build(Degrees(), "cpu"), JobConfig(), torch.float32)
    assert str(error.value) == "the plan's blocks are decoder.*, but Tiny has none of them"


def test_patterns() -> None:
    model = make(blocks=2)
    assert list(find(model, ("layers.*", "norm"))) == ["layers.0", "layers.1", "norm"]
    assert list(find(model, ("*.*.wo",))) == ["layers.0.wo", "layers.1.wo"]
    assert find(model, ("layers", "layer.*", "norms")).keys() == {"layers"}
    assert find(model, ()) == {}


def _dry(degrees: Degrees, rank: int) -> dict[str, Any]:
    """A step of a model that exists nowhere, on a rank of a job that does not run."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=degrees.world, store=FakeStore())
    dims = ParallelDims.build(degrees, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = parallelize(Tiny(blocks=2), PLAN, dims, JobConfig(), torch.bfloat16)
        tokens = torch.zeros(2, SEQ, dtype=torch.int64)
        for _ in range(2):
            loss_sum(model, tokens, tokens, chunked=False).backward()
        torch.optim.AdamW(model.parameters()).step()
        return {
            name: (tuple(p.shape), tuple(p.to_local().shape), tuple(p.grad.to_local().shape))
            for name, p in model.named_parameters()
            if name in ("tok_embeddings.weight", "layers.1.up.weight")
        }


def test_dry_run() -> None:
    degrees = Degrees(dp_replicate=512, dp_shard=8)
    shapes = run_ranks(1, _dry, degrees, degrees.world - 1, backend=None)[0]
    assert shapes == {
        "tok_embeddings.weight": ((VOCAB, DIM), (1, DIM), (1, DIM)),
        "layers.1.up.weight": ((2 * DIM + 1, DIM), (0, DIM), (0, DIM)),
    }
