"""Footprint: what one rank holds for as long as the job runs: parameters, gradients, optimizer state, counted and
weighed.

Counted from the tensors themselves after one step in fake mode, where they have shapes but no memory: so whatever a
layout, a tied matrix or an uneven shard does to them is in the numbers. Formulas were rejected: they would describe
what the program ought to do. Activations, communication and time are not part of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

GIB = 2**30


@dataclass(frozen=True)
class Amount:
    """Elements and bytes of some tensors on one rank."""

    elements: int
    bytes: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.elements + other.elements, self.bytes + other.bytes)


@dataclass(frozen=True)
class Footprint:
    """One rank's lasting tensors."""

    parameters: Amount
    gradients: Amount
    optimizer: Amount

    @property
    def total(self) -> Amount:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer

    def table(self) -> str:
        """A line each: elements, bytes, GiB."""
        rows = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "total": self.total,
        }
        return "\n".join(
            f"  {name:<12}{amount.elements:>18,}{amount.bytes:>20,} bytes{amount.bytes / GIB:>12.3f} GiB"
            for name, amount in rows.items()
        )


def amount(tensors: Iterable[Tensor]) -> Amount:
    """What this rank holds of these tensors; of a DTensor its local shard."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return Amount(sum(t.numel() for t in local), sum(t.numel() * t.element_size() for t in local))


def footprint(models: Iterable[nn.Module], optimizer_state: Iterable[Tensor]) -> Footprint:
    """The footprint after a backward pass: gradients are those that are there."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    return Footprint(
        amount(parameters), amount(p.grad for p in parameters if p.grad is not None), amount(optimizer_state)
    )
