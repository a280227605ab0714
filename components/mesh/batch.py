"""Batch: what flows from a row source through a model into a loss; Part, a rank's share of its rows; and RowLoss, the
loss's answer.

They stand here since both ends must agree on them, and no room owns both ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that no loss is taken at."""


@dataclass(frozen=True)
class Batch:
    """Rows of equal length. All tensors are int64, so that any device can index with them, and (rows, seq) but where
    it is said."""

    tokens: Tensor
    """Input token ids."""
    labels: Tensor
    """The token that follows each input token, or IGNORE."""
    positions: Tensor
    """Position of each token: from 0 in each row, or with `data.document_mask` from 0 in each document."""
    document_ids: Tensor
    """Number of the document that each token belongs to, counted from 0 in each row."""
    ahead_tokens: Tensor | None = None
    """For multi-token prediction, in training: the token k places after each, for k = 1 … depth. # (rows, seq,
    depth)"""
    ahead_labels: Tensor | None = None
    """The token after that one, or IGNORE. # (rows, seq, depth)"""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> "Batch":
        """Rows `start` to `stop`."""
        return self.map(lambda x: x[start:stop])

    def pin(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self.map(lambda x: x.pin_memory())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of what `fn` makes of each tensor."""
        ahead = (None if x is None else fn(x) for x in (self.ahead_tokens, self.ahead_labels))
        return Batch(fn(self.tokens), fn(self.labels), fn(self.positions), fn(self.document_ids), *ahead)

    def stacked(self) -> Tensor:
        """All its tensors in one. # (rows, tensors, seq)"""
        plain = torch.stack((self.tokens, self.labels, self.positions, self.document_ids), dim=1)
        ahead = (x.mT for x in (self.ahead_tokens, self.ahead_labels) if x is not None)
        return torch.cat((plain, *ahead), dim=1)

    @classmethod
    def unstacked(cls, whole: Tensor) -> "Batch":
        """The inverse of `stacked`."""
        ahead = (part.mT for part in whole[:, 4:].chunk(2, dim=1)) if whole.shape[1] > 4 else ()
        return cls(*whole[:, :4].unbind(1), *ahead)


@dataclass(frozen=True)
class Part:
    """The part of each row that a rank has, for what goes by places in the row: attention's masks."""

    index: Tensor
    """Where in the row each of its tokens stands. # (tokens,)"""
    length: int
    """Tokens of a row."""
    whole: Callable[[Tensor], Tensor]
    """Makes whole rows, in order, of numbers of its tokens. # (rows, tokens) → (rows, length)"""

    def not_later(self) -> Tensor:
        """Which tokens of the row do not come after each of its own. # bool (tokens, length)"""
        return self.index[:, None] >= torch.arange(self.length, device=self.index.device)


class RowLoss(NamedTuple):
    """What a loss returns. Sums, never means: whoever knows the whole global batch divides, once."""

    sums: Tensor
    """Loss summed over the valid labels of each row, fp32, differentiable. # (rows,)"""
    counts: Tensor
    """Valid labels of each row, int64. # (rows,)"""
