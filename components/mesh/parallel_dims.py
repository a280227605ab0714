"""ParallelDims: the job's ranks as meshes, one for each way of looking at them.

The same ranks 0 … world − 1, tensor-parallel neighbours next to each other, are seen in three ways:

    data loading  [pp, batch, cp, tp]                who reads which rows; who adds up losses (loss = batch × cp)
    dense         [pp, dp_replicate, fsdp, tp]       who holds which dense parameters
    sparse        [pp, dp_replicate, efsdp, ep, etp] who holds which experts

A dimension of size 1 is left out, and a single process needs no process group at all. Each dimension's process group
belongs to one view, `dp_replicate`'s to both that hold parameters; where another view has the dimension only for its
arithmetic (`pp` and `tp` outside dense), it gets the backend "fake", which cannot communicate and costs nothing.

The views are separate meshes of the public `init_device_mesh`. Unflattening one world mesh was rejected: that API is
private, and nothing slices across views. Build outside of FakeTensorMode; the accessors then work inside it too.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from components.mesh.collectives import Axis
from components.mesh.degrees import Degrees
from components.runtime.errors import MeshError

VIEWS = {
    "loading": ("pp", "batch", "cp", "tp"),
    "loss": ("pp", "loss", "tp"),
    "dense": ("pp", "dp_replicate", "fsdp", "tp"),
    "sparse": ("pp", "dp_replicate", "efsdp", "ep", "etp"),
}
"""The dimensions of each view, outermost first."""

OWNED = {
    "loading": ("batch", "cp"),
    "loss": ("loss",),
    "dense": ("pp", "dp_replicate", "fsdp", "tp"),
    "sparse": ("dp_replicate", "efsdp", "ep", "etp"),
}
"""The dimensions whose process groups are made in that view."""


class ParallelDims:
    """Degrees, this process's rank, and the meshes. Make it with `build`."""

    def __init__(self, degrees: Degrees, rank: int, views: Mapping[str, DeviceMesh]) -> None:
        self.degrees = degrees
        self.rank = rank
        self._views = views
        self._slices: dict[tuple[str, ...], DeviceMesh] = {}

    @classmethod
    def build(cls, degrees: Degrees, device_type: str) -> "ParallelDims":
        """Meshes over the initialized process group, built on all ranks alike; without one, for a single process.

        Raises MeshError if the process group has another number of ranks than the degrees.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != degrees.world:
            raise MeshError(f"the degrees make {degrees.world} ranks, but {world} are connected: {degrees}")
        if not dist.is_initialized():
            return cls(degrees, 0, {})
        views = {view: _build(view, degrees, device_type) for view in VIEWS if _needed(view, degrees)}
        return cls(degrees, dist.get_rank(), views)

    def mesh(self, *names: str) -> DeviceMesh | None:
        """The mesh over dimensions of one view, in the view's order, without those of size 1; None if none is left.

        Names: batch, cp; loss; pp, dp_replicate, fsdp, tp; efsdp, ep, etp. `mesh("dp_replicate", "fsdp")` is HSDP's.
        The last three exist only where experts are laid out unlike dense parameters: with an expert degree above 1, or
        with `tp`.
        Raises MeshError for names that no view owns together.
        """
        view = _owner(names)
        large = tuple(name for name in VIEWS[view] if name in names and getattr(self.degrees, name) > 1)
        if not large:
            return None
        if view == "loss" and view not in self._views:  # batch or cp is 1: the other one is the loss mesh
            return self.mesh("batch", "cp")
        return self._slice(view, large) if view in self._views else None

    def parameter_mesh(self) -> DeviceMesh | None:
        """The mesh that dense parameters live on: (dp_replicate, fsdp) with several replicas, else (fsdp,).

        `fsdp` may have size 1 here, so that what one rank shares with many (mixed precision, replication) is one
        mechanism. None only without a process group.
        """
        if "dense" not in self._views:
            return None
        return self._slice("dense", ("dp_replicate", "fsdp") if self.degrees.dp_replicate > 1 else ("fsdp",))

    def expert_mesh(self) -> DeviceMesh | None:
        """The mesh that experts' parameters live on besides (ep, etp): as `parameter_mesh`, with `efsdp` for `fsdp`."""
        if "sparse" not in self._views:
            return self.parameter_mesh()
        return self._slice("sparse", ("dp_replicate", "efsdp") if self.degrees.dp_replicate > 1 else ("efsdp",))

    def axis(self, name: str) -> Axis | None:
        """One dimension for `components.mesh.collectives`; None if its size is 1."""
        mesh = self.mesh(name)
        return None if mesh is None else Axis(mesh.get_group(), mesh.size(), mesh.get_local_rank())

    @property
    def data_rank(self) -> int:
        """Which rows this rank reads: the rows r of a global batch with r ≡ data_rank (mod data_degree)."""
        return self.rank // (self.degrees.cp * self.degrees.tp) % self.degrees.batch

    @property
    def data_degree(self) -> int:
        """Number of ranks that read different rows."""
        return self.degrees.batch

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of one dimension; None if its size is 1, so that there is nothing to reduce."""
        mesh = self.mesh(name)
        return None if mesh is None else mesh.get_group()

    def _slice(self, view: str, names: tuple[str, ...]) -> DeviceMesh:
        """A mesh that lives as long as this: LocalTensorMode knows meshes by their `id`, and takes one that is made
        anew for a dead one that stood at the same address."""
        if (view, *names) not in self._slices:
            self._slices[view, *names] = self._views[view][names]
        return self._slices[view, *names]


def _owner(names: tuple[str, ...]) -> str:
    for view, owned in OWNED.items():
        if set(names) <= set(owned):
            return view
    raise MeshError(f"no mesh has {' and '.join(names)}: allowed together: {'; '.join(map(', '.join, OWNED.values()))}")


def _needed(view: str, degrees: Degrees) -> bool:
    """Whether the view holds a group that no other view has."""
    if view == "dense":
        return True
    if view == "sparse":
        return degrees.ep * degrees.etp * degrees.tp > 1
    if view == "loss":
        return degrees.batch > 1 and degrees.cp > 1
    return degrees.loss > 1


def _build(view: str, degrees: Degrees, device_type: str) -> DeviceMesh:
    """One view, without its dimensions of size 1; only `fsdp` and `efsdp` stay: unsharded parameters live there."""
    sizes = {name: getattr(degrees, name) for name in VIEWS[view]}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name in ("fsdp", "efsdp")}
    fake: dict[int | str, Any] = {name: "fake" for name, size in sizes.items() if size == 1 or name not in OWNED[view]}
    return init_device_mesh(
        device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=fake or None
    )
