"""What `parallelism.fsdp_reshard_after_forward` and the finer keys of `[activation_checkpoint]` do."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from components.config.compute import ActivationCheckpoint
from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.data import shard
from components.parallel.recompute import recompute
from tests.components.parallel.tiny import PLAN, batch, loss_sum, make
from tests.ranks import run_ranks

shows = pytest.mark.shows


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func.name()] += 1
        return func(*args, **(kwargs or {}))


def gathered_in_backward(degrees: Degrees) -> list[int]:
    """Parameter units that backward has to gather again, by policy."""
    found = []
    for policy in ("default", "always", "never"):
        model, dims = make(), ParallelDims.build(degrees, "cpu")
        shard(model, PLAN, dims, Parallelism(fsdp_reshard_after_forward=policy), torch.float32)
        loss = loss_sum(model, *batch(2), chunked=False)
        with Counting() as count:
            loss.backward()
        found.append(count.operations["c10d::_allgather_base_"])
    return found


@shows("parallelism.fsdp_reshard_after_forward")
def test_resharding() -> None:
    """Three blocks and the embedding; the head comes first in backward, so that only `always` frees it."""
    assert run_ranks(2, gathered_in_backward, Degrees(dp_shard=2)) == [[4, 5, 0]] * 2


class Block(nn.Module):
    """Does something else when it runs a second time, where it is told to; notes each time that it comes to its end."""

    def __init__(self, changes: bool = False, drops: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 64))
        self.changes, self.drops, self.runs, self.ends = changes, drops, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        dtype = torch.float64 if self.changes and self.runs > 1 else torch.float32
        x = x.to(dtype) * self.weight.to(dtype)
        x = F.dropout(x) if self.drops else x
        self.ends += 1
        return x


def run(block: Block, **settings: Any) -> tuple[Tensor, Tensor]:
    """Output and the weight's gradient of a block that is recomputed."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": block})
    recompute(
        model, Plan(blocks=("layers.*",), embedding="none", head="none"), ActivationCheckpoint(mode="full", **settings)
    )
    out = block(torch.ones(64))
    out.sum().backward()
    assert block.weight.grad is not None
    return out.detach(), block.weight.grad


@shows("activation_checkpoint.early_stop")
@pytest.mark.parametrize(("early_stop", "ends"), [(False, 2), (True, 1)])
def test_early_stop(early_stop: bool, ends: int) -> None:
    block = Block()
    run(block, early_stop=early_stop)
    assert (block.runs, block.ends) == (2, ends)


@shows("activation_checkpoint.preserve_rng_state")
@pytest.mark.parametrize("preserve", [True, False])
def test_preserve_rng_state(preserve: bool) -> None:
    block = Block(drops=True)
    out, gradient = run(block, preserve_rng_state=preserve)
    assert torch.equal(gradient != 0, out != 0) == preserve  # else what was dropped and what is learned differ


@shows("activation_checkpoint.determinism_check")
def test_determinism_check() -> None:
    assert torch.equal(run(Block(changes=True), determinism_check="none")[1], torch.ones(64))
    with pytest.raises(CheckpointError, match="have different metadata than during the forward pass"):
        run(Block(changes=True), determinism_check="default")


@shows("activation_checkpoint.debug")
def test_debug() -> None:
    with pytest.raises(CheckpointError) as quiet:
        run(Block(changes=True))
    assert "aten.mul.Tensor" not in str(quiet.value)
    with pytest.raises(CheckpointError) as loud:
        run(Block(changes=True), debug=True)
    assert "aten.mul.Tensor" in str(loud.value)
