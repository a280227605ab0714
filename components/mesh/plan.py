"""Plan: what a model tells the generic appliers about itself. A model says what it is; `components.parallel` does the rest."""

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
    head: tuple[str, ...]
    """The final norm and the output head; sharded together, since the loss needs them at the same time."""
    fp32: tuple[str, ...] = ()
    """Modules whose parameters stay fp32 under mixed precision."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of parameter names that are one parameter (in some flavors); they are sharded by one group."""
