"""Compile: one graph for all equal blocks, the same gradients, whatever else is applied."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import register_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from components.config.compute import ActivationCheckpoint, Compile
from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.apply import parallelize
from components.parallel.compile import compile_loss
from tests.components.parallel.test_data import Case, _step
from tests.components.parallel.tiny import PLAN, batch, gradients, loss_sum, make
from tests.ranks import run_ranks

NONE = ActivationCheckpoint(mode="none")


def _gradients(
    recompute: ActivationCheckpoint, degrees: Degrees, config: Compile
) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of a step after an evaluation, and the parameters' names. 10 blocks exceed dynamo's limit."""
    dims = ParallelDims.build(degrees, "cpu")
    job = JobConfig(activation_checkpoint=recompute, compile=config)
    model: Any = parallelize(make(blocks=10), PLAN, dims, job, torch.float32)
    with torch.no_grad():
        loss_sum(model, *batch(4), chunked=False)
    _step(model, Case(degrees), dims.data_rank, dims.data_degree)
    return gradients(model), list(model.state_dict())


def _compare(kinds: list[ActivationCheckpoint], degrees: Degrees) -> list[tuple[int, bool]]:
    """For each kind of recompute: graphs, and whether compiled gradients are near enough to the eager ones."""
    expected, names = _gradients(kinds[0], degrees, Compile(enable=False))
    found = []
    for recompute in kinds:
        torch._dynamo.reset()
        counter: Any = CompileCounterWithBackend("aot_eager")
        register_backend(counter, name=f"counter_{len(found)}")
        config = Compile(enable=True, backend=f"counter_{len(found)}")
        compiled, compiled_names = _gradients(recompute, degrees, config)
        near = all((compiled[name] - grad).abs().max() < 1e-5 * grad.abs().max() for name, grad in expected.items())
        found.append((counter.frame_count, near and compiled_names == names and not counters["graph_break"]))
    return found


SECOND = ActivationCheckpoint(mode="selective", selective_ac_option="2")
BY_OP = ActivationCheckpoint(mode="selective", selective_ac_option="op")


@pytest.mark.shows("compile.enable", "compile.backend")
def test_equal_blocks_share_one_graph() -> None:
    """With and without gradients (evaluation) are two graphs; blocks that are recomputed and others are two kinds."""
    kinds = [NONE, ActivationCheckpoint(mode="full"), SECOND, BY_OP]
    assert run_ranks(1, _compare, kinds, Degrees(), backend=None) == [[(2, True), (2, True), (4, True), (2, True)]]


@pytest.mark.slow
def test_equal_blocks_share_one_graph_under_fsdp() -> None:
    assert run_ranks(2, _compare, [NONE, BY_OP], Degrees(dp_shard=2)) == [[(2, True), (2, True)]] * 2


def _loss(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1).sum()


@pytest.mark.shows("compile.components")
def test_loss() -> None:
    assert compile_loss(_loss, Compile(enable=False)) is _loss
    assert compile_loss(_loss, Compile(enable=True, components=["model"])) is _loss
    compiled = compile_loss(_loss, Compile(enable=True, components=["loss"], backend="eager"))
    x = torch.arange(12.0).reshape(3, 4)
    assert compiled is not _loss
    assert compiled(x).item() == _loss(x).item()
