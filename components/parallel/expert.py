"""Expert parallelism: the experts of a layer are dealt to ranks, and tokens travel to them and back.

Each rank routes its own tokens. It tells every rank how many of them that rank's experts get, sends them in one
all-to-all of uneven pieces, and gets the results back in another. Weights stay where they are: stacked expert matrices
are DTensors over (ep, etp), cut by expert over `ep` and along `hidden` over `etp`.

With `etp` = 1 the ranks of tensor parallelism, which hold pieces of a sequence between blocks, send their pieces
apart. With `etp` = `tp` they share each expert's matrices, so routed tokens are gathered over them first, and the
summands that come out are reduced and scattered. In both, weights get gradients of every token once, as sums. The bias
of an expert's output is no summand: ranks that share it each hold and add a piece of it, along `dim`.

Dispatch is never compiled: how much goes where is known only at run time. The rest of the block is.

Rejected: capacities, which make the pieces even by dropping tokens; and permuting kernels, which save a copy but need
Triton.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home; torch's own documentation imports it here
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor

from components.mesh.collectives import Axis, all_to_all, gather, reduce_scatter, sizes_of
from components.mesh.experts import TokenRanks, back, by_expert, combine, routed
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.modules import find
from components.runtime.errors import MeshError

CUT_BY = {name: {"ep": 0, "etp": 1} for name in ("w1", "w3", "b1", "b2", "b3")} | {"w2": {"ep": 0, "etp": 2}}
"""The dimension of each stacked parameter that a dimension of the mesh cuts: by expert; along `hidden`, but b2, which
has no such dimension, along `dim`."""


class Layer(Protocol):
    """What is asked of a layer that the plan names."""

    ranks: TokenRanks
    """Whose tokens it sees."""
    experts: nn.Module
    """Its experts: `Computes`, with parameters of `CUT_BY`."""


class Computes(Protocol):
    """What is asked of the experts of a layer."""

    sharing: Axis | None
    """Ranks that share each expert."""

    def compute(self, x: Tensor, counts: Tensor) -> Tensor:
        """Local experts on their tokens, which are ordered by expert. # (tokens, dim)"""
        ...


def expert(model: nn.Module, plan: Plan, dims: ParallelDims) -> None:
    """Deal the experts of the plan's layers over (ep, etp), in place, and tell the layers whose tokens they see.

    Raises MeshError if a layer's sizes cannot be cut evenly.
    """
    ranks = TokenRanks(
        sequence=dims.axis("tp"),
        row=_axes(dims, "cp", "tp"),
        batch=_axes(dims, "loss", "tp"),
    )
    for name, module in find(model, plan.experts).items():
        layer = cast(Layer, module)
        layer.ranks, experts = ranks, layer.experts
        cast(Computes, experts).sharing = dims.axis("etp")
        _cut(name, experts, dims.mesh("ep", "etp"))
        forward = _Dispatch(experts, dims).run if dims.degrees.ep * dims.degrees.etp > 1 else experts.forward
        experts.forward = torch.compiler.disable(forward, reason="how many tokens an expert gets is data")


def _axes(dims: ParallelDims, *names: str) -> tuple[Axis, ...]:
    return tuple(axis for axis in map(dims.axis, names) if axis is not None)


def _cut(name: str, experts: nn.Module, mesh: DeviceMesh | None) -> None:
    """Make the parameters DTensors over what there is of (ep, etp)."""
    if mesh is None:
        return
    for leaf, whole in list(experts.named_parameters(recurse=False)):
        cuts = CUT_BY[leaf]
        placements: list[Placement] = []
        for axis, ranks in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True):
            if whole.shape[cuts[axis]] % ranks:
                raise MeshError(
                    f"{name}.experts.{leaf}: {whole.shape[cuts[axis]]} (dimension {cuts[axis]} of"
                    f" {tuple(whole.shape)}) cannot be dealt evenly to the {ranks} ranks of {axis}"
                )
            placements.append(Shard(cuts[axis]))
        piece = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
        setattr(experts, leaf, nn.Parameter(piece, requires_grad=whole.requires_grad))


class _Dispatch:
    """The `forward` of experts that are dealt to ranks."""

    def __init__(self, experts: nn.Module, dims: ParallelDims) -> None:
        self.experts = cast(Computes, experts)
        self.count = experts.get_parameter("w1").shape[0]
        self.ep, self.etp = dims.axis("ep"), dims.axis("etp")

    def run(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """# tokens (tokens, dim), experts (tokens, k), weights (tokens, k) → (tokens, 1, dim)"""
        x, chosen, weights = gather(x, 0, self.etp), gather(chosen, 0, self.etp), gather(weights, 0, self.etp)
        order, counts = by_expert(chosen.flatten(), self.count)
        x = routed(x, order, chosen.shape[1])
        out = self.experts.compute(x, counts) if self.ep is None else self.exchange(x, counts, self.ep)
        return reduce_scatter(combine(out, order, weights), 0, self.etp)

    def exchange(self, x: Tensor, counts: Tensor, ep: Axis) -> Tensor:
        """Send tokens to the ranks of their experts, compute there, and bring the results back.

        Args:
            x: Tokens, ordered by expert. # (tokens, dim)
            counts: Tokens of each of all experts. # (experts,)
            ep: The ranks that experts are dealt to.

        Returns:
            Results in the order of `x`. # (tokens, dim)
        """
        leaving = counts.view(ep.size, -1)  # (ranks, experts of each)
        coming = all_to_all(leaving, [1] * ep.size, [1] * ep.size, ep)  # from each rank, for each of my experts
        sent, received = _lengths(torch.stack((leaving, coming)), len(x))
        x = all_to_all(x, received, sent, ep)  # by rank, then by expert
        mine = torch.arange(leaving.shape[1], device=x.device).repeat(ep.size)
        order, totals = by_expert(mine.repeat_interleave(coming.flatten(), output_size=len(x)), leaving.shape[1])
        out = back(self.experts.compute(x.index_select(0, order), totals), order)
        return all_to_all(out, sent, received, ep)


def _lengths(counts: Tensor, tokens: int) -> Sequence[Sequence[int]]:
    """Tokens of each rank, those sent and those received, on the host: the one time that a layer waits for the device.

    Shapes without content have no counts: there, ranks get equal shares. # (2, ranks, experts of each)
    """
    if isinstance(counts, FakeTensor) or counts.is_meta:
        return [sizes_of(tokens, counts.shape[1])] * 2
    return counts.sum(2).tolist()
