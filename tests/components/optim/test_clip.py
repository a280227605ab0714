import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from components.optim.clip import clip_gradients, gradient_norm, scale_gradients
from tests.ranks import run_ranks


def _parameters(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


def _grads(parameters: list[nn.Parameter]) -> list[list[float]]:
    return [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None]


def test_norm_from_before_and_scaled_gradients() -> None:
    parameters = [*_parameters([3.0, 0.0], [0.0, 4.0, 0.0]), nn.Parameter(torch.zeros(2))]
    norm = clip_gradients(parameters, 2.5)
    assert norm.item() == 5.0
    assert _grads(parameters) == [[pytest.approx(1.5, rel=1e-6), 0.0], [0.0, pytest.approx(2.0, rel=1e-6), 0.0]]
    assert parameters[2].grad is None


def test_below_the_limit_nothing_changes() -> None:
    parameters = _parameters([3.0, 4.0])
    assert clip_gradients(parameters, 5.1).item() == 5.0
    assert _grads(parameters) == [[3.0, 4.0]]


def test_inf_only_measures() -> None:
    parameters = _parameters([3e9, 4e9])
    assert clip_gradients(parameters, math.inf).item() == 5e9
    assert _grads(parameters) == [[3e9, 4e9]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_that_is_not_finite_scales_nothing(bad: float) -> None:
    parameters = _parameters([bad, 1.0], [7.0])
    norm = clip_gradients(parameters, 1.0)
    assert str(norm.item()) == str(bad)
    assert [str(_grads(parameters)[0][0]), _grads(parameters)[0][1], _grads(parameters)[1]] == [str(bad), 1.0, [7.0]]


def test_no_gradients() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


def test_bfloat16_gradients_are_measured_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    norm = gradient_norm([parameter])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(float(torch.tensor(0.1).bfloat16()) * math.sqrt(1000), rel=1e-5)
    scale_gradients([parameter], norm, norm.item() / 2)
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad[0].item() == pytest.approx(0.05, rel=1e-2)


def _whole() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (3, 4), (6, 2), (2, 2))]


def _layouts() -> tuple[float, list[torch.Tensor]]:
    """Gradients in every layout at once: sharded unevenly, HSDP, replicated, of another mesh, and plain."""
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    a, b, c, d, plain = _whole()
    sharded = [
        _distributed(a, flat, [Shard(0)]),
        _distributed(b, square, [Replicate(), Shard(0)]),
        _distributed(c, square, [Shard(0), Shard(1)]),
        _distributed(d, flat, [Replicate()]),
    ]
    last = nn.Parameter(torch.zeros_like(plain))
    last.grad = plain.clone()
    parameters = [*sharded, last]
    norm = clip_gradients(parameters, 1.5)
    assert not isinstance(norm, DTensor)
    return norm.item(), [_full(parameter.grad) for parameter in parameters]


def _distributed(gradient: torch.Tensor, mesh: dist.DeviceMesh, placements: list[Placement]) -> nn.Parameter:
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, placements))
    parameter.grad = distribute_tensor(gradient, mesh, placements)
    return parameter


def _full(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def test_every_layout_at_once_equals_one_process() -> None:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in _whole()]
    for parameter, gradient in zip(parameters, _whole(), strict=True):
        parameter.grad = gradient
    expected = nn.utils.clip_grad_norm_(parameters, 1.5).item()
    for norm, gradients in run_ranks(4, _layouts):
        assert norm == pytest.approx(expected, rel=1e-6)
        for mine, parameter in zip(gradients, parameters, strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=1e-7)


def _partial_and_group() -> tuple[float, float]:
    mesh = init_device_mesh("cpu", (2,))
    summand = DTensor.from_local(torch.tensor([1.5, 2.0]), mesh, [Partial()], run_check=False)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    parameter.grad = summand
    own = _parameters([3.0] if dist.get_rank() == 0 else [4.0])  # each rank holds another stage's parameters
    return gradient_norm([parameter]).item(), gradient_norm(own, dist.group.WORLD).item()


def test_summands_and_stages() -> None:
    assert run_ranks(2, _partial_and_group) == [(5.0, 5.0), (5.0, 5.0)]


def test_the_norm_is_where_it_is_asked_for() -> None:
    """Ranks with and without gradients, or with offloaded ones, must reduce on the same device."""
    for parameters in ([], _parameters([3.0, 4.0])):
        assert gradient_norm(parameters, device=torch.device("meta")).device.type == "meta"


def test_the_norm_of_large_gradients_is_accurate_however_they_are_cut() -> None:
    """fp32 sums over millions of elements drift by their length, and so by the layout: a shard is shorter."""
    whole = torch.full((4096, 1024), 0.1)
    whole[0, 0] = 30.0
    exact = whole.double().norm().item()
    for pieces in (1, 2, 4):
        parameters = [nn.Parameter(torch.empty_like(piece)) for piece in whole.chunk(pieces)]
        for parameter, piece in zip(parameters, whole.chunk(pieces), strict=True):
            parameter.grad = piece
        assert gradient_norm(parameters).item() == pytest.approx(exact, rel=1e-6)
