"""Pipeline parallelism: the model cut into stages."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stage:
    """A piece of the model that one rank runs as a whole."""

    index: int
    """Place among all stages of the model, from 0."""
    count: int
    """Number of stages."""
    module: nn.Module
    """The model, without what other stages hold."""

    @property
    def first(self) -> bool:
        """Whether it takes token ids."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the head, and so the loss."""
        return self.index == self.count - 1
