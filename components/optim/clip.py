"""Gradient clipping by the global norm, for plain tensors and DTensors alike, in two halves.

First the norm, then the scaling: in between the caller can look at the norm and stop before anything has changed. The
norm is taken over local shards and reduced once, in float64, for all gradients that are sharded alike. torch's
get_total_norm was rejected: it refuses plain tensors beside DTensors, reduces in the gradients' own type, and pays
DTensor dispatch for every parameter.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from components.runtime.distributed import all_reduce_sum

Layout = tuple[torch.device, DeviceMesh | None, tuple[int, ...]]
"""Device, mesh (None for plain tensors), and the mesh dimensions over which shards have to be added up."""


class Squares:
    """Squared norms of gradients, added up as they come, and reduced over ranks once. It does not sync."""

    def __init__(self) -> None:
        self._by_layout: dict[Layout, Tensor] = {}

    @torch.no_grad()
    def add(self, gradients: Iterable[Tensor]) -> None:
        """Take note of gradients, which are not kept."""
        by_layout: dict[Layout, list[Tensor]] = {}
        for gradient in gradients:
            layout, local = _layout(gradient)
            by_layout.setdefault(layout, []).append(local)
        for layout, locals_ in by_layout.items():
            square = _square(locals_, layout[0])
            self._by_layout[layout] = self._by_layout[layout] + square if layout in self._by_layout else square

    @torch.no_grad()
    def norm(self, group: ProcessGroup | None = None, device: torch.device | None = None) -> Tensor:
        """What `gradient_norm` says of all gradients that were added. Collective."""
        squares = []
        for (_, mesh, dims), square in sorted(self._by_layout.items(), key=_in_order):  # the same on all ranks
            for dim in dims:
                all_reduce_sum(square, mesh.get_group(dim) if mesh else None)
            squares.append(square)
        device = device or (squares[0].device if squares else None)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for square in squares:
            total = total + square.to(total.device)
        return all_reduce_sum(total, group).sqrt().float()


def gradient_norm(
    parameters: Iterable[nn.Parameter], group: ProcessGroup | None = None, device: torch.device | None = None
) -> Tensor:
    """The norm of all gradients as one vector: a plain 0-d fp32 tensor, equal on all ranks. It does not sync.

    Sharded gradients are added up over the mesh dimensions that shard them, replicated ones count once. `group` are
    ranks that hold other parameters of the same model (pipeline stages). 0 if there are no gradients.

    The norm is on `device`, by default that of the first gradient. With a `group`, give it: ranks that have no gradient
    and ranks whose gradients are offloaded must reduce on one device, since each has a back end of its own.
    """
    squares = Squares()
    squares.add(_gradients(parameters))
    return squares.norm(group, device)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, in place, so that their norm is at most `max_norm`; `inf` leaves them alone.

    `norm` is what `gradient_norm` returned. A norm that is not finite scales nothing: the caller has decided before
    whether to step at all. It does not sync.
    """
    if math.isinf(max_norm):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(norm.isfinite(), factor, torch.ones_like(factor))
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_device.setdefault(local.device, []).append(local)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.to(device))  # one kernel for all; torch.optim's own way, no public name


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, group: ProcessGroup | None = None) -> Tensor:
    """Measure, then scale; the norm from before."""
    parameters = list(parameters)
    norm = gradient_norm(parameters, group)
    scale_gradients(parameters, norm, max_norm)
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _layout(gradient: Tensor) -> tuple[Layout, Tensor]:
    """How a gradient is laid out, and this rank's piece of it."""
    if not isinstance(gradient, DTensor):
        return (gradient.device, None, ()), gradient
    if any(p.is_partial() for p in gradient.placements):  # squares of summands do not add up
        gradient = gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])
    dims = tuple(dim for dim, p in enumerate(gradient.placements) if not p.is_replicate())
    return (gradient.device, gradient.device_mesh, dims), gradient.to_local()


def _in_order(item: tuple[Layout, Tensor]) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Where a layout comes among others, whatever the order in which gradients came."""
    device, mesh, dims = item[0]
    return device.type, (mesh.mesh_dim_names or ()) if mesh else (), dims


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The squared norm of local gradients on one device, 0-d float64."""
    norms = _norms_by_row(gradients) if device.type == "cpu" else torch._foreach_norm(gradients, 2.0, torch.float32)
    return torch.cat([norm.flatten() for norm in norms]).double().square().sum()


def _norms_by_row(gradients: list[Tensor]) -> list[Tensor]:
    """Norms of the rows of each gradient, fp32.

    A CPU's fp32 norm adds up in a few long chains: over a million elements it is off by 1e-4, and by how much depends
    on the length of the shard. Accelerators have one kernel for all gradients; how far it drifts is not measured.
    """
    return [torch.linalg.vector_norm(g, dim=-1, dtype=torch.float32) for g in gradients]
