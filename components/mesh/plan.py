"""Plan: what a model tells the generic appliers about itself. A model says what it is; `components.parallel` does the
rest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A model's structure, by module names relative to the model.

    Names may hold `*` for one path element: `layers.*` means every child of `layers`.
    """

    blocks: tuple[str, ...]
    """The repeated blocks: the unit of recompute, of compile and of sharding."""
    embedding: str
    """The input embedding; sharded on its own."""
    head: str
    """The output head, sharded on its own: the loss calls it after the model's forward has returned. What is between
    the blocks and the head (the final norm) belongs to the root."""
    fp32: tuple[str, ...] = ()
    """Modules whose parameters stay fp32 under mixed precision."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of parameter names that are one parameter (in some flavors); the root then holds them."""
