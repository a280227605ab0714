"""Data parallelism: replicated (DDP), sharded (FSDP2) and both (HSDP) by one mechanism, `fully_shard`.

The mesh alone decides. Over (fsdp,) parameters are sharded; over (dp_replicate, fsdp) shards are replicated; and with
fsdp = 1 every rank holds a whole copy, which is DDP. So mixed precision, accumulation, offload, tied weights and the
state dict are the same everywhere, also on one rank. The price: a whole copy is copied once more, unit by unit, before
it is used (FSDP2's gather, without communication), and freed after. `DistributedDataParallel` was rejected: it casts by
autocast, prefixes names, and shares no code with the rest. See docs/decisions/020.

Gradients are summed over ranks, never averaged: the trainer's loss is already divided by the global token count.
"""

from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.modules import find


def needs_process_group(
    degrees: Degrees, param_dtype: torch.dtype, compute_dtype: torch.dtype, cpu_offload: bool
) -> bool:
    """Whether the job must initialize a process group; on one rank only for what `fully_shard` does there.

    Args:
        degrees: The job's degrees.
        param_dtype: Type that parameters are stored in.
        compute_dtype: Type that they are cast to for compute.
        cpu_offload: `training.enable_cpu_offload`.
    """
    return degrees.world > 1 or compute_dtype != param_dtype or cpu_offload


def shard(
    model: nn.Module,
    plan: Plan,
    dims: ParallelDims,
    parallelism: Parallelism,
    compute_dtype: torch.dtype,
    cpu_offload: bool = False,
) -> None:
    """Apply data parallelism in place. Parameters become DTensors; without a process group nothing happens.

    Units, each gathered and reduced in one piece: embedding, every block, head, fp32 modules (so that a unit has one
    type), each layer's experts (which have a mesh of their own), and the root with the rest. Tied parameters belong to
    the root, which stays gathered from the model's forward to the end of backward, so that the embedding and the head,
    which the loss calls later, find them.

    Args:
        model: On any device, meta included. With `cpu_offload` its parameters are to be materialized on the CPU.
        plan: The model's structure.
        dims: The mesh.
        parallelism: For `fsdp_reshard_after_forward`.
        compute_dtype: Type that parameters, but not inputs, are cast to. Gradients are reduced in fp32.
        cpu_offload: Keep shards, gradients and optimizer state in host memory.
    """
    mesh = dims.parameter_mesh()
    if mesh is None:
        return
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": _offload(mesh, cpu_offload)}
    policy = _precision(compute_dtype)
    reshard = _reshard(parallelism, dims)
    if compute_dtype != torch.float32:
        for module in find(model, plan.fp32).values():
            fully_shard(module, **shared, mp_policy=_precision(torch.float32), reshard_after_forward=reshard)
    for module in _experts(model, plan):
        own = shared | {"mesh": dims.expert_mesh(), "shard_placement_fn": partial(_even_dimension, dims.degrees.efsdp)}
        fully_shard(module, **own, mp_policy=policy, reshard_after_forward=reshard)
    for module in _units(model, plan):
        fully_shard(module, **shared, mp_policy=policy, reshard_after_forward=reshard)
    head = find(model, (plan.head,)).get(plan.head)
    if head is not None and not _tied(model, plan):
        always = parallelism.fsdp_reshard_after_forward == "always"  # else it is needed again at once, by backward
        fully_shard(head, **shared, mp_policy=policy, reshard_after_forward=always)
    fully_shard(model, **shared, mp_policy=policy, reshard_after_forward=False)
    _sum_gradients(model)
    _gather_ahead(model, plan)
    _free_after_evaluation(model, head)


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Say before each microbatch's backward whether it is the step's last; without data parallelism a no-op.

    Until the last, replicas add up their gradients without communication. Shards are reduced each time all the same:
    to hold back would mean to hold the whole model's fp32 gradient on every rank.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def _precision(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    # Inputs are left alone: hidden states come in the compute type from the embedding, rotary angles stay fp32.
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _offload(mesh: DeviceMesh, cpu_offload: bool) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()


def _reshard(parallelism: Parallelism, dims: ParallelDims) -> bool:
    """Whether blocks free their parameters after forward; by default not under pipeline parallelism (see the key)."""
    policy = parallelism.fsdp_reshard_after_forward
    return policy == "always" or (policy == "default" and dims.degrees.pp == 1)


def _units(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Embedding, if it has its parameters for itself, and blocks."""
    embedding = () if _tied(model, plan) else (plan.embedding,)
    return list(find(model, (*embedding, *plan.blocks)).values())


def _experts(model: nn.Module, plan: Plan) -> list[nn.Module]:
    return [layer.get_submodule("experts") for layer in find(model, plan.experts).values()]


def _gather_ahead(model: nn.Module, plan: Plan) -> None:
    """Ask for the next block's parameters before a block computes, where experts make the host wait for the device.

    Elsewhere the host runs ahead and asks early enough by itself. The price is a second block's parameters in memory.
    """
    if not plan.experts:
        return
    inside = {id(experts) for experts in _experts(model, plan)}
    blocks = [
        [block, *(part for part in block.modules() if id(part) in inside)]
        for block in find(model, plan.blocks).values()
        if isinstance(block, FSDPModule)
    ]
    for (block, *_), following in pairwise(blocks):
        cast(FSDPModule, block).set_modules_to_forward_prefetch(cast(list[FSDPModule], following))
    for (block, *_), following in pairwise(reversed(blocks)):
        cast(FSDPModule, block).set_modules_to_backward_prefetch(cast(list[FSDPModule], following))


def _even_dimension(ranks: int, parameter: nn.Parameter) -> Shard:
    """By expert where there are enough of them here for all ranks, else along another dimension that divides.

    A block's other matrices have thousands of rows; of experts, a rank may have a single one. Where nothing divides,
    by expert again, since only the first dimension may be cut unevenly.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(next((dim for dim, size in enumerate(local.shape) if size % ranks == 0), 0))


def _tied(model: nn.Module, plan: Plan) -> bool:
    """Whether any parameters that may be tied are so in this flavor, with both ends in this stage of the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return any(a in parameters and parameters[a] is parameters.get(b) for a, b in plan.tied)


def _sum_gradients(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else gloo is asked for PREMUL_SUM, which it does not have


def _free_after_evaluation(model: nn.Module, head: nn.Module | None) -> None:
    """Without gradients no backward comes that frees what is still gathered, so the end of the forward pass does it.

    Else evaluation would leave whole parameters behind, in memory and in `model.parameters()`. The end of the pass is
    the head's.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def free(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            for unit in units:
                unit.reshard()

    (model if head is None else head).register_forward_hook(free)
