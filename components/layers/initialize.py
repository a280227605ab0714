"""Initialization by name: what each parameter starts as is a table, and filling it in does not depend on the layout.

A model gives the table (name → Init) rather than a method that draws: names and seed alone then decide the values, in
any order and on any shard, and a reader sees all of it in one place. `nn.init` was rejected, since it draws in
sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.mesh.counter import derive_key, fill_, normal, truncated_normal
from components.runtime.errors import ConfigError


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float

    def draw(self, key: int, index: Tensor) -> Tensor:
        """fp32 values at these global element indices."""
        return torch.full_like(index, self.value, dtype=torch.float32)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    std: float
    """Standard deviation, before truncation."""
    cutoff: float | None = None
    """Largest magnitude in units of `std`; None: no truncation."""

    def draw(self, key: int, index: Tensor) -> Tensor:
        """fp32 values at these global element indices."""
        values = normal(key, index) if self.cutoff is None else truncated_normal(key, index, self.cutoff)
        return values.mul_(self.std)


Init = Constant | Normal
"""How one parameter is initialized."""


def initialize(model: nn.Module, inits: Mapping[str, Init], seed: int) -> None:
    """Fill every parameter, plain or DTensor, of any dtype, in place; call it once the parameters have memory.

    The values depend on `seed`, the parameter's name in `model` and the element's index in the whole parameter alone.
    A tied parameter is filled once, under the first of its names. Entries for parameters that are not in `model` are
    left out, so that one table serves all pipeline stages. Raises ConfigError that names the parameters without an
    Init.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in inits]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} has no initial value for {', '.join(missing)}: add an entry to its `inits()`"
        )
    for name, parameter in parameters.items():
        fill_(parameter, derive_key(seed, "init", name), inits[name].draw)
