"""Degrees: how many ways a job is cut along each axis of the mesh. Arithmetic only,
without torch, so that `check` can do it.

The names are the mesh's: `batch` and `loss` speak of data, `fsdp` of dense parameters, `efsdp` of expert parameters.
Expert parallelism adds no ranks: it deals the ranks of `fsdp` × `tp` anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from components.config.parallelism import Parallelism
from components.runtime.errors import MeshError


@dataclass(frozen=True)
class Degrees:
    """Degrees that fit each other; `resolve_degrees` makes them from a configuration."""

    dp_replicate: int = 1
    """Copies of the model."""
    dp_shard: int = 1
    """Ranks that share one copy's parameters and read different rows."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share each matrix."""
    pp: int = 1
    """Ranks that the layers are dealt to."""
    ep: int = 1
    """Ranks that the experts are dealt to."""
    etp: int = 1
    """Ranks that share each expert's matrices."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.batch * self.cp * self.tp * self.pp

    @property
    def batch(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of the dense parameters: those that share a sequence share parameters too."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Ranks that share one copy of an expert's parameters."""
        return self.fsdp * self.tp // (self.ep * self.etp)

    @property
    def loss(self) -> int:
        """Ranks whose losses add up to the global batch's."""
        return self.batch * self.cp

    def __str__(self) -> str:
        """As logs show it: data parallelism always, other degrees above 1, and how the same ranks share experts."""
        more = {"context": self.cp, "tensor": self.tp, "pipeline": self.pp}
        dense = {"replicated": self.dp_replicate, "sharded": self.dp_shard}
        text = _times(dense | {name: degree for name, degree in more.items() if degree > 1})
        if self.ep * self.etp == 1:
            return text
        return f"{text}; experts {_times({'sharded': self.efsdp, 'expert': self.ep, 'expert tensor': self.etp})}"


def _times(degrees: Mapping[str, int]) -> str:
    return " × ".join(f"{degree} {name}" for name, degree in degrees.items())


def resolve_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """Degrees of a configuration on `world_size` ranks; a shard degree of −1 takes what is left.

    Raises MeshError if they do not multiply to the number of ranks, or if the expert degrees do not fit.
    """
    shard = parallelism.data_parallel_shard_degree
    degrees = _degrees(parallelism, _left_over(parallelism, world_size) if shard == -1 else shard)
    if degrees.world != world_size:
        raise MeshError(
            f"{_product(degrees)} = {degrees.world} ranks, but there are {world_size}: {_mend(degrees, world_size)}"
        )
    _check_experts(degrees)
    return degrees


def _degrees(p: Parallelism, dp_shard: int) -> Degrees:
    return Degrees(
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=dp_shard,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        pp=p.pipeline_parallel_degree,
        ep=p.expert_parallel_degree,
        etp=p.expert_tensor_parallel_degree,
    )


def _left_over(parallelism: Parallelism, world_size: int) -> int:
    rest = _degrees(parallelism, 1)
    if world_size % rest.world:
        raise MeshError(
            f"{_product(rest, shard=False)} = {rest.world} ranks, which does not divide the {world_size} that there "
            f"are: start a multiple of {rest.world} ranks, or lower one of these degrees"
        )
    return world_size // rest.world


def _product(d: Degrees, shard: bool = True) -> str:
    shards = f" × {d.dp_shard} (shard)" if shard else ""
    return f"{d.dp_replicate} (replicate){shards} × {d.cp} (context) × {d.tp} (tensor) × {d.pp} (pipeline)"


def _mend(d: Degrees, world_size: int) -> str:
    rest = d.world // d.dp_shard
    if world_size % rest:
        return f"start {d.world} ranks, or choose degrees whose product is {world_size}"
    return (
        f"set `parallelism.data_parallel_shard_degree` to {world_size // rest} (or to -1: all that are left), "
        f"or start {d.world} ranks"
    )


def _check_experts(d: Degrees) -> None:
    if d.etp not in (1, d.tp):
        allowed = "1" if d.tp == 1 else f"1 or {d.tp}"
        raise MeshError(
            f"`parallelism.expert_tensor_parallel_degree` = {d.etp} is neither 1 nor the tensor-parallel degree "
            f"{d.tp}: set it to {allowed}"
        )
    ranks = d.fsdp * d.tp
    if ranks % (d.ep * d.etp):
        raise MeshError(
            f"{d.ep} (expert) × {d.etp} (expert tensor) = {d.ep * d.etp} does not divide the "
            f"{d.dp_shard} (shard) × {d.cp} (context) × {d.tp} (tensor) = {ranks} ranks that experts are dealt to: "
            f"set `parallelism.expert_parallel_degree` to a divisor of {ranks // d.etp}"
        )
