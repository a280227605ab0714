"""Projection: what an output head hands to a loss, so that logits over a sharded vocabulary need never be gathered.

It stands here since head and loss must agree on it, and no room owns both. A loss that knows nothing of it calls it
like a function and gets all logits, on any layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from components.mesh.collectives import Axis, join, sizes_of


@dataclass(frozen=True)
class VocabularyShard:
    """The piece of the vocabulary that this rank's logits are of."""

    axis: Axis
    """The ranks that share the vocabulary, in its order."""
    vocab_size: int
    """Entries of the whole vocabulary."""
    size: int
    """Entries of this rank's piece. It may be 0."""

    @property
    def start(self) -> int:
        """The first entry of this rank's piece; the end of the vocabulary or beyond if it is empty."""
        return self.axis.rank * self.sizes[0]

    @property
    def sizes(self) -> list[int]:
        """Every rank's entries."""
        return sizes_of(self.vocab_size, self.axis.size)

    @property
    def some_empty(self) -> bool:
        """Whether there is a rank without any. Known alike on all ranks, so that all can take the same way."""
        return self.sizes[-1] == 0


@dataclass(frozen=True)
class Projection:
    """Hidden states (..., dim) → logits (..., vocab). Called, it gives the whole vocabulary on every rank."""

    local: Callable[[Tensor], Tensor]
    """Hidden states → this rank's logits: of its `shard`, or all."""
    shard: VocabularyShard | None = None
    """What `local` gives; None: all logits."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """All logits. # (..., dim) → (..., vocab)"""
        logits = self.local(hidden)
        return logits if self.shard is None else join(logits, -1, self.shard.axis, self.shard.sizes)
