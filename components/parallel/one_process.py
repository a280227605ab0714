"""All ranks in one process (`comm.mode = "local_tensor"`): what takes the place of data parallelism there.

Torch's LocalTensor holds the pieces of all ranks and runs each operation on every one, so that a program for one rank
runs as all of them, with real numbers and real collectives, and can be debugged like any other program. It does not
carry FSDP2, which resizes storages; so parameters stay whole here, and gradients are summed over the ranks that would
have shared them by hooks. Mixed precision and offloading, which are FSDP2's, go with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import (  # the mode has no public home yet
    LocalTensor,
    LocalTensorMode,
    local_tensor_mode,
)
from torch.distributed.tensor import DTensor

from components.mesh.collectives import Axis, all_reduce
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.modules import find
from components.runtime.errors import MeshError


def spread(tensor: Tensor, mode: LocalTensorMode) -> LocalTensor:
    """The same tensor on every rank."""
    return mode.rank_map(lambda rank: tensor.clone())


def replicate(model: nn.Module, plan: Plan, dims: ParallelDims) -> None:
    """Let every rank have its own copy of what is not cut, and sum gradients over ranks. In place, under the mode.

    Args:
        model: With values; its DTensors have been cut already.
        plan: The model's structure.
        dims: The mesh: tensor and context parallelism.
    """
    mode = local_tensor_mode()
    if mode is None:
        raise MeshError('comm.mode = "local_tensor": the model is laid out outside of LocalTensorMode')
    experts = tuple(f"{name}.experts." for name in find(model, plan.experts))
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in copies:
            copies[parameter] = _copied(parameter, mode)
            apart = name.startswith(experts) and dims.degrees.efsdp != dims.degrees.fsdp
            axis = dims.axis("efsdp" if apart else "fsdp")
            if axis is not None:
                copies[parameter].register_hook(_summed(axis))
        _replace(model, name, copies[parameter])
    for name, buffer in list(model.named_buffers()):
        _replace(model, name, spread(buffer, mode))


def _copied(parameter: nn.Parameter, mode: LocalTensorMode) -> nn.Parameter:
    """The parameter with a tensor for each rank. A piece has them; of what is whole, torch keeps one for all, which an
    optimizer would step once for each."""
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return nn.Parameter(spread(value, mode))
    local = value.to_local()
    return parameter if isinstance(local, LocalTensor) else nn.Parameter(_like(value, spread(local, mode)))


def _like(tensor: DTensor, local: Tensor) -> DTensor:
    """A DTensor laid out as another."""
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, value)


def _summed(axis: Axis) -> Any:
    @torch.no_grad()
    def hook(gradient: Tensor) -> Tensor:
        if not isinstance(gradient, DTensor):
            return all_reduce(gradient, axis)
        return _like(gradient, all_reduce(gradient.to_local(), axis))

    return hook
