"""Cross-entropy of the next token: per-row sums and counts, over all tokens at once or in chunks.

All at once is fastest, and holds the logits of all tokens and their gradient: 2 · rows · seq · vocab · 4 bytes in fp32.
In chunks only one chunk's logits exist at any time; the price is one more projection per chunk, in backward. Computing
the gradient already in forward would save that price, and was rejected: forward would then cost the same without a
backward (validation), and the gradient could not be scaled by what is known only later.

Sums per token come first, then per row: `reduction="sum"` per row would be a kernel for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.config.training import Loss
from components.mesh.batch import IGNORE, Batch, RowLoss
from components.mesh.registry import Registry

Project = Callable[[Tensor], Tensor]
"""Hidden states (..., dim) → logits (..., vocab)."""


class LossFn(Protocol):
    """A loss. It calls `head` once at most, so that the head's hooks (gathering, resharding) fire once."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """`hidden` is (rows, seq, dim), after the final norm; the answer is differentiable in it and in the head."""
        ...


losses: Registry[Callable[[Loss], LossFn]] = Registry("loss", "loss.name")


def build_loss(config: Loss) -> LossFn:
    """The loss of `[loss]`. Raises ConfigError for an unknown name."""
    return losses.lookup(config.name)(config)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in fp32; exactly 0, with gradient 0, where the label is IGNORE.

    `logits` (tokens, vocab), `labels` (tokens,) → (tokens,)
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


@dataclass(frozen=True)
class CrossEntropy:
    """Projects all tokens at once."""

    token_losses: Callable[[Tensor, Tensor], Tensor] = token_losses
    """What is taken of each token's logits; the part that is worth compiling (`dataclasses.replace`)."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """See LossFn."""
        logits = head(hidden)  # (rows, seq, vocab)
        return _by_row(self.token_losses(logits.flatten(0, 1), batch.labels.flatten()), batch.labels)


@dataclass(frozen=True)
class ChunkedCrossEntropy:
    """Projects `chunk_tokens` tokens at a time, in backward once more. Same values as CrossEntropy."""

    chunk_tokens: int
    """Tokens whose logits exist at one time."""
    token_losses: Callable[[Tensor, Tensor], Tensor] = token_losses
    """As in CrossEntropy."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """See LossFn. `head(hidden, apply)` must call `apply(hidden, project)` inside its forward."""
        labels = batch.labels.flatten().split(self.chunk_tokens)

        def apply(hidden: Tensor, project: Project) -> Tensor:
            pieces = hidden.flatten(0, 1).split(self.chunk_tokens)  # one backward for all pieces, unlike slices
            return torch.cat([self._piece(h, y, project) for h, y in zip(pieces, labels, strict=True)])

        return _by_row(head(hidden, apply), batch.labels)

    def _piece(self, hidden: Tensor, labels: Tensor, project: Project) -> Tensor:
        def of_piece(hidden: Tensor) -> Tensor:
            return self.token_losses(project(hidden), labels)

        if not torch.is_grad_enabled():
            return of_piece(hidden)
        return checkpoint(of_piece, hidden, use_reentrant=False, preserve_rng_state=False)


def _by_row(values: Tensor, labels: Tensor) -> RowLoss:
    return RowLoss(values.view(labels.shape).sum(1), (labels != IGNORE).sum(1))


@losses.decorator("cross_entropy")
def _cross_entropy(config: Loss) -> LossFn:
    return CrossEntropy()


@losses.decorator("chunked_cross_entropy")
def _chunked_cross_entropy(config: Loss) -> LossFn:
    return ChunkedCrossEntropy(config.chunk_tokens)
