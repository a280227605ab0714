"""How a sequence is dealt to the ranks of context parallelism: which chunks of each row a rank holds.

In equal pieces one after the other, the last rank would have almost all of causal attention's work: its queries see
all keys, the first rank's only their own. Dealt from head and tail at once, as chunks r and 2·size − 1 − r of 2·size,
each rank has the same work; the price is that a rank's tokens are two stretches, each half as long.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.mesh.collectives import Axis
from components.mesh.tiled_attention import Tile


@dataclass(frozen=True)
class Deal:
    """Who holds which chunks. Rank order: the ranks' pieces one after the other; row order: as the tokens follow."""

    axis: Axis
    """The ranks."""
    headtail: bool
    """Two chunks for each rank, from head and tail; else one."""

    @property
    def count(self) -> int:
        """Chunks of a row."""
        return self.axis.size * (2 if self.headtail else 1)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in the order in which it holds them."""
        return (rank, self.count - 1 - rank) if self.headtail else (rank,)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of whole rows. The length along `dim` is a multiple of `count`."""
        return x.index_select(dim, self.indices(x.shape[dim] // self.axis.size, x.device))

    def to_row_order(self, x: Tensor, dim: int) -> Tensor:
        """Whole rows, from their parts in rank order."""
        order = self._rank_order()
        return _arrange(x, dim, sorted(range(len(order)), key=order.__getitem__)) if self.headtail else x

    def to_rank_order(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `to_row_order`."""
        return _arrange(x, dim, self._rank_order()) if self.headtail else x

    def indices(self, length: int, device: torch.device) -> Tensor:
        """Where in the row each of this rank's `length` tokens stands. # (length,)"""
        n = length * self.axis.size // self.count
        # A sum and not a slice: a symbolic rank can be added to a tensor, but not slice one that all ranks have alike.
        return torch.cat([torch.arange(n, device=device) + chunk * n for chunk in self.chunks(self.axis.rank)])

    def steps(self, length: int) -> tuple[tuple[Tile, ...], ...]:
        """The tiles that are not empty by causality, while the keys of all ranks pass by.

        At step s the keys at hand are those of rank − s. `length` is a rank's number of tokens. Diagonal tiles come
        first, so that each query begins with what it surely sees: itself.
        """
        ranks = [(self.axis.rank - step) % self.axis.size for step in range(self.axis.size)]
        return tuple(self._tiles(rank, length) for rank in ranks)

    def _tiles(self, source: int, length: int) -> tuple[Tile, ...]:
        n = length * self.axis.size // self.count
        tiles = [
            Tile(i * n, n, j * n, n, theirs * n, causal=theirs == mine)
            for i, mine in enumerate(self.chunks(self.axis.rank))
            for j, theirs in enumerate(self.chunks(source))
            if theirs <= mine
        ]
        return tuple(sorted(tiles, key=lambda tile: not tile.causal))

    def whole(self, length: int) -> tuple[Tile, ...]:
        """The tiles of this rank's queries against all keys in row order: for each chunk its own, and all before."""
        n = length * self.axis.size // self.count
        own = [Tile(i * n, n, c * n, n, c * n, causal=True) for i, c in enumerate(self.chunks(self.axis.rank))]
        return (*own, *(Tile(t.query, n, 0, t.column, 0, causal=False) for t in own if t.column))

    def _rank_order(self) -> list[int]:
        return [chunk for rank in range(self.axis.size) for chunk in self.chunks(rank)]


def _arrange(x: Tensor, dim: int, order: list[int]) -> Tensor:
    pieces = x.chunk(len(order), dim)
    return torch.cat([pieces[i] for i in order], dim=dim)
