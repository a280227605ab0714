"""Recompute changes how often things are computed, counted here, and no gradient."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.config.compute import ActivationCheckpoint
from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel import recompute as module
from components.parallel.data import shard
from components.parallel.recompute import recompute
from components.runtime.errors import ConfigError
from tests.components.parallel.test_data import Case, _step
from tests.components.parallel.tiny import PLAN, gradients, make
from tests.ranks import run_ranks

NONE = ActivationCheckpoint(mode="none")
FULL = ActivationCheckpoint(mode="full")
BY_OP = ActivationCheckpoint(mode="selective", selective_ac_option="op")
ONE = Case(Degrees())


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _run(config: ActivationCheckpoint) -> tuple[dict[str, Tensor], Counter[str], list[str]]:
    """Gradients, operations executed, and the calls of each block's forward, in order."""
    model, calls = make(blocks=4), []
    for name, block in model.layers.items():
        block.forward = _recording(block.forward, calls, name)
    recompute(model, PLAN, config)
    with _Count() as count:
        _step(model, ONE, 0, 1)
    return gradients(model), count.ops, calls


def _recording(forward: Any, calls: list[str], name: str) -> Any:
    def recorded(*args: Any) -> Any:
        calls.append(name)
        return forward(*args)

    return recorded


# A block has four matmuls and one attention; forward and backward of four blocks and the head have 17 + 34 matmuls.
@pytest.mark.parametrize(
    ("config", "matmuls", "attentions", "again"),
    [
        (NONE, 51, 4, ""),
        (FULL, 51 + 16, 8, "3210"),
        (ActivationCheckpoint(mode="selective", selective_ac_option="2"), 51 + 8, 6, "31"),
        (ActivationCheckpoint(mode="selective", selective_ac_option="3"), 51 + 4, 5, "2"),
        (BY_OP, 51 + 8, 4, "3210"),
        (replace(BY_OP, per_op_sac_force_recompute_mm_shapes_by_fqns=["wqkv", "wo"]), 51 + 12, 4, "3210"),
        (replace(BY_OP, saved_ops=["aten::silu"]), 51 + 8, 8, "3210"),
    ],
    ids=["none", "full", "second", "third", "op", "op-forced", "op-saved"],
)
@pytest.mark.shows(
    "activation_checkpoint.mode",
    "activation_checkpoint.selective_ac_option",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
    "activation_checkpoint.saved_ops",
)
def test_what_is_recomputed(config: ActivationCheckpoint, matmuls: int, attentions: int, again: str) -> None:
    expected, _, _ = _run(NONE)
    found, ops, calls = _run(config)
    assert "".join(calls) == "0123" + again
    assert ops["aten::mm"] == matmuls
    assert ops["aten::_scaled_dot_product_flash_attention_for_cpu"] == attentions
    assert {name: torch.equal(grad, found[name]) for name, grad in expected.items()} == dict.fromkeys(expected, True)


def test_names_stay() -> None:
    model = make()
    recompute(model, PLAN, FULL)
    assert list(model.state_dict()) == list(make().state_dict())


def test_settings_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "checkpoint", lambda forward, *args, **settings: passed.append(settings) or args[0])
    model = make(blocks=1)
    config = replace(FULL, preserve_rng_state=False, determinism_check="none", early_stop=True, debug=True)
    recompute(model, PLAN, config)
    model(torch.zeros(1, 7, dtype=torch.int64))
    assert passed == [
        {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "determinism_check": "none",
            "early_stop": True,
            "debug": True,
        }
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ActivationCheckpoint(mode="selective", selective_ac_option="0"),
            "activation_checkpoint.selective_ac_option = '0': allowed are an integer n of at least 1, "
            "which recomputes every n-th block, and 'op'",
        ),
        (
            ActivationCheckpoint(mode="memory_budget"),
            'activation_checkpoint.mode = "memory_budget": needs compiled blocks, see compile.enable',
        ),
        (
            replace(BY_OP, debug=True),
            "activation_checkpoint.debug = true cannot go with selective_ac_option = 'op': "
            "set debug to false, or selective_ac_option to an integer",
        ),
        (
            replace(BY_OP, per_op_sac_force_recompute_mm_shapes_by_fqns=["layers.0.gate"]),
            "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns: layers.0.gate is a Gate, but only "
            "linear layers have a matmul to recompute: name one of those",
        ),
        (
            replace(BY_OP, saved_ops=["aten::mm", "aten::multiply_twice"]),
            "activation_checkpoint.saved_ops: torch has no operation 'aten::multiply_twice'; name one as"
            " namespace::name, such as aten::mm",
        ),
    ],
)
def test_refusals(config: ActivationCheckpoint, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recompute(make(), PLAN, config)
    assert str(error.value) == message


def _all(case: Case) -> list[dict[str, Tensor]]:
    dims, found = ParallelDims.build(case.degrees, "cpu"), []
    for config in (NONE, FULL, BY_OP):
        model, plan = make(), replace(PLAN, fp32=case.fp32)
        recompute(model, plan, config)
        shard(model, plan, dims, Parallelism(), getattr(torch, case.compute))
        _step(model, case, dims.data_rank, dims.data_degree)
        found.append(gradients(model))
    return found


@pytest.mark.parametrize(
    "case",
    [Case(Degrees(dp_shard=2)), Case(Degrees(dp_replicate=2), compute="bfloat16", fp32=("layers.*.gate",))],
    ids=["fsdp", "ddp-bf16-fp32-modules"],
)
def test_under_data_parallelism(case: Case) -> None:
    expected, *others = run_ranks(2, _all, case)[0]
    for found in others:
        assert {name: torch.equal(grad, found[name]) for name, grad in expected.items()} == dict.fromkeys(
            expected, True
        )
