import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from components.config.optim import Optimizer, ParameterGroup
from components.optim.names import OPTIMIZERS
from components.optim.optimizers import Optimizers, build_optimizers, optimizers, require_used
from components.runtime.errors import ConfigError
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class _Net(nn.Module):
    """Parameters under names like a model's; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(4, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.layers = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in range(2)})


def _model(seed: int = 0) -> _Net:
    torch.manual_seed(seed)
    return _Net()


def _gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _build(model: nn.Module, **config: Any) -> Optimizers:
    return build_optimizers([model], Optimizer(lr=0.01, **config), CPU)


def test_names_without_torch_are_the_registered_ones() -> None:
    assert set(optimizers) >= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "for-loop"])
def test_steps_are_torchs(name: str, implementation: str) -> None:
    model, reference = _model(), _model()
    ours = _build(model, name=name, implementation=implementation, beta1=0.8, eps=1e-6, weight_decay=0.2)
    make = getattr(torch.optim, name)
    theirs = make(reference.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, foreach=False)
    for step in range(3):
        _gradients(model, step)
        _gradients(reference, step)
        ours.step()
        theirs.step()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def _kernels(ours: Optimizers) -> set[tuple[bool, bool]]:
    return {(group["foreach"], group["fused"]) for group in ours._optimizer.param_groups}


@pytest.mark.shows("optimizer.implementation")
def test_implementation() -> None:
    assert _kernels(_build(_model())) == {(False, True)}  # this torch has fused kernels on the CPU
    assert _kernels(_build(_model(), implementation="foreach")) == {(True, False)}
    assert _kernels(_build(_model(), implementation="for-loop")) == {(False, False)}


def test_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.optim.optimizers._has_fused", lambda make, device: False)
    assert _kernels(_build(_model())) == {(True, False)}
    with pytest.raises(ConfigError) as caught:
        _build(_model(), implementation="fused")
    assert str(caught.value) == (
        "optimizer.implementation = 'fused': AdamW has no fused kernel on cpu; allowed: auto, foreach, for-loop"
    )


def test_unknown_name() -> None:
    with pytest.raises(ConfigError) as caught:
        _build(_model(), name="AdaW")
    assert str(caught.value) == (
        "optimizer.name = 'AdaW': no such optimizer; allowed: Adam, AdamW (did you mean 'AdamW'?)"
    )


@pytest.mark.shows(
    "optimizer.parameter_groups.pattern",
    "optimizer.parameter_groups.lr_factor",
    "optimizer.parameter_groups.weight_decay",
)
def test_groups_first_match_wins() -> None:
    model = _model()
    entries = [
        ParameterGroup(r"norm|bias", weight_decay=0.0),
        ParameterGroup(r"^layers\.", lr_factor=0.5),
        ParameterGroup(r"layers\.1|wq", lr_factor=0.0, weight_decay=0.3),
    ]
    ours = _build(model, parameter_groups=entries)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in ours._optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "wq.weight": (0.0, 0.3),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "layers.0.weight": (0.005, 0.1),
        "layers.0.bias": (0.01, 0.0),
        "layers.1.weight": (0.005, 0.1),
        "layers.1.bias": (0.01, 0.0),
    }
    before = model.wq.weight.detach().clone()
    _gradients(model, 0)
    ours.step()
    assert torch.equal(model.wq.weight, before)  # a factor of 0 freezes
    assert not torch.equal(model.norm.weight, torch.ones(6))


def test_patterns_that_are_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        _build(_model(), parameter_groups=[ParameterGroup("("), ParameterGroup("norm"), ParameterGroup("[")])
    assert caught.value.problems == (
        "optimizer.parameter_groups[0].pattern = '(': no regular expression:"
        " missing ), unterminated subpattern at position 0",
        "optimizer.parameter_groups[2].pattern = '[': no regular expression: unterminated character set at position 0",
    )


def test_patterns_that_take_nothing() -> None:
    entries = [ParameterGroup("norm"), ParameterGroup("embed"), ParameterGroup(r"norm\.bias")]
    with pytest.raises(ConfigError) as caught:
        require_used([name for name, _ in _model().named_parameters()], entries)
    assert caught.value.problems == (
        "optimizer.parameter_groups[1].pattern = 'embed': matches no parameter; there are: layers.*.bias,"
        " layers.*.weight, norm.bias, norm.weight, wq.weight",
        r"optimizer.parameter_groups[2].pattern = 'norm\\.bias': earlier entries (0) take all that it matches;"
        " put it before them, or remove it",
    )


def test_learning_rate() -> None:
    ours = _build(_model(), parameter_groups=[ParameterGroup("norm", lr_factor=0.5)])
    ours.set_lr_factor(0.1)
    assert ours.lr == 0.001
    assert sorted({group["lr"] for group in ours._optimizer.param_groups}) == [0.0005, 0.001]


def test_frozen_and_tied_parameters() -> None:
    model = _model()
    model.get_parameter("layers.0.weight").requires_grad_(False)
    tied = nn.Linear(4, 6, bias=False)
    tied.weight = model.wq.weight
    model.tied = tied
    assert {name.rpartition(".")[0] for name in _build(model).named_state()} == {
        "wq.weight", "norm.weight", "norm.bias", "layers.0.bias", "layers.1.weight", "layers.1.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_made_without_changing_anything(name: str) -> None:
    model, untouched = _model(), _model()
    ours, reference = _build(model, name=name), _build(untouched, name=name)
    _gradients(model, 0)
    assert ours.bytes() == 0
    state = ours.named_state()
    elements = sum(p.numel() for p in model.parameters())
    assert ours.bytes() == elements * 8 + 7 * 4  # two moments, and a counter per parameter
    assert set(state) == {
        f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert all(not value.any() for value in state.values())
    for mine, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, other)
    _gradients(untouched, 0)
    ours.step()
    reference.step()
    for mine, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_loading_in_place_continues_bit_for_bit() -> None:
    straight, ours = _model(), None
    ours = _build(straight)
    for step in range(2):
        _gradients(straight, step)
        ours.step()
    saved = {key: value.clone() for key, value in ours.named_state().items()}
    resumed = copy.deepcopy(straight)
    resumed.zero_grad()
    again = _build(resumed)
    for key, value in again.named_state().items():
        value.copy_(saved[key])
    for step in range(2, 4):
        for model, optimizer in ((straight, ours), (resumed, again)):
            _gradients(model, step)
            optimizer.step()
    for mine, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert again.named_state()["wq.weight.step"].item() == 4


def test_zero_grad_frees() -> None:
    model = _model()
    ours = _build(model)
    _gradients(model, 0)
    ours.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


class _Numbers(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["count"] = 1


def test_state_that_is_no_tensor() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError) as caught:
        Optimizers(_Numbers([weight], lr=0.1), {weight: "weight"}, 0.1).named_state()
    assert str(caught.value) == "optimizer.name: its state 'count' is a int: only tensors can be saved"


def _sharded_steps(implementation: str) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    model = _model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=mesh, ignored_params={model.norm.bias})  # one plain parameter among DTensors
    ours = _build(model, implementation=implementation, parameter_groups=[ParameterGroup("norm", weight_decay=0.0)])
    state = ours.named_state()
    shapes = {key: [*value.shape] for key, value in state.items() if key.endswith("exp_avg")}
    for step in range(2):
        whole = _model()
        _gradients(whole, step)
        for mine, other in zip(model.parameters(), whole.parameters(), strict=True):
            mine.grad = _like(other.grad, mine)
        ours.step()
    return {name: _whole(p) for name, p in model.named_parameters()}, shapes


def _like(gradient: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert gradient is not None
    if not isinstance(parameter, DTensor):
        return gradient
    return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_sharded_parameters_step_as_whole_ones(implementation: str) -> None:
    model = _model()
    ours = _build(model, parameter_groups=[ParameterGroup("norm", weight_decay=0.0)])
    for step in range(2):
        _gradients(model, step)
        ours.step()
    for weights, shapes in run_ranks(2, _sharded_steps, implementation):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-6, atol=1e-8)
            assert shapes[f"{name}.exp_avg"] == [*parameter.shape]
