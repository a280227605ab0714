"""Initialization: by name, independent of the layout, complete or refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from components.layers.initialize import Constant, Init, Normal, initialize
from components.runtime.errors import ConfigError
from tests.ranks import run_ranks

INITS: dict[str, Init] = {
    "0.weight": Normal(0.02),
    "0.bias": Constant(0.5),
    "1.weight": Normal(0.5, cutoff=3.0),
    "1.bias": Constant(0.0),
}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 7))


def plain(seed: int = 0) -> dict[str, Tensor]:
    model = make()
    initialize(model, INITS, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_values_follow_the_table() -> None:
    values = plain()
    assert values["0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["1.weight"].std().item() == pytest.approx(0.5 * 0.9866, rel=0.1)
    assert values["1.weight"].abs().max() <= 1.5
    assert torch.equal(values["0.bias"], torch.full((50,), 0.5))
    assert torch.equal(values["1.bias"], torch.zeros(7))


def test_values_depend_on_seed_and_name_alone() -> None:
    assert torch.equal(plain(0)["0.weight"], plain(0)["0.weight"])
    assert not torch.equal(plain(0)["0.weight"], plain(1)["0.weight"])
    pair = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    initialize(pair, {"a.weight": Normal(1.0), "b.weight": Normal(1.0), "not here": Normal(1.0)}, 0)
    alone = nn.ModuleDict({"b": nn.Linear(8, 8, bias=False)})
    initialize(alone, {"b.weight": Normal(1.0)}, 0)
    assert torch.equal(pair.get_parameter("b.weight"), alone.get_parameter("b.weight"))
    assert not torch.equal(pair.get_parameter("a.weight"), pair.get_parameter("b.weight"))


def test_a_tied_parameter_is_filled_once_under_its_first_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    initialize(model, {"a.weight": Constant(1.0), "b.weight": Constant(2.0)}, 0)
    assert torch.equal(model.get_parameter("b.weight"), torch.ones(8, 8))


def test_a_parameter_without_init_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        initialize(make(), {"0.weight": Normal(1.0), "1.weight": Normal(1.0)}, 0)
    assert str(caught.value) == "Sequential has no initial value for 0.bias, 1.bias: add an entry to its `inits()`"


def _sharded(shape: tuple[int, ...]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = make()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model[0], mesh=mesh)  # pyrefly: ignore[bad-index]
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    initialize(model, INITS, 0)
    return {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_sharded_and_replicated_equal_plain(shape: tuple[int, ...]) -> None:
    expected = plain()
    for found in run_ranks(4, _sharded, shape):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
