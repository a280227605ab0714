"""Cross-entropy of the next token: per-row sums and counts, over all tokens at once or in chunks.

All at once is fastest, and holds the logits of all tokens and their gradient: 2 · rows · seq · vocab · 4 bytes in fp32.
In chunks only one chunk's logits exist at any time; the price is one more projection per chunk, in backward. Computing
the gradient already in forward would save that price, and was rejected: forward would then cost the same without a
backward (validation), and the gradient could not be scaled by what is known only later.

Over a sharded vocabulary (tensor parallelism) no rank ever sees all logits of a token: the largest, the sum of the
exponentials and the label's logit are three numbers a token, which the ranks exchange. The price is that our own
softmax takes the place of PyTorch's fused one.

Sums per token come first, then per row: `reduction="sum"` per row would be a kernel for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.config.training import Loss
from components.mesh.batch import IGNORE, Batch, RowLoss
from components.mesh.collectives import all_reduce, largest
from components.mesh.projection import Projection, VocabularyShard
from components.mesh.registry import Registry


class LossFn(Protocol):
    """A loss. It calls `head` once at most, so that the head's hooks (gathering, resharding) fire once."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """`hidden` is what the model returned, after the final norm: (rows, seq, dim), or this rank's piece of each
        sequence. What `head` answers, and what it hands to `apply`, is of whole sequences. The answer is
        differentiable in `hidden` and in the head."""
        ...


losses: Registry[Callable[[Loss], LossFn]] = Registry("loss", "loss.name")


def build_loss(config: Loss) -> LossFn:
    """The loss of `[loss]`. Raises ConfigError for an unknown name."""
    return losses.lookup(config.name)(config)


TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""Logits (tokens, vocab), labels (tokens,) → losses (tokens,)."""
ShardLosses = Callable[[Tensor, Tensor, VocabularyShard], Tensor]
"""This rank's logits (tokens, its vocabulary), labels (tokens,), what they are a shard of → losses (tokens,)."""


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in fp32; exactly 0, with gradient 0, where the label is IGNORE.

    `logits` (tokens, vocab), `labels` (tokens,) → (tokens,)
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def shard_losses(logits: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
    """The same from this rank's logits alone. # logits (tokens, shard.size), labels (tokens,) → (tokens,)"""
    if shard.some_empty:  # so that each rank has a largest logit
        logits = F.pad(logits, (0, 1), value=-torch.inf)
    return _ShardedCrossEntropy.apply(logits, labels, shard)


class _ShardedCrossEntropy(torch.autograd.Function):
    """log Σ exp(logits) − logits[label], from each rank's logits. What follows is the same on all ranks.

    Backward makes the probabilities anew from the logits: kept are those, in their own type, and two numbers a token,
    whose sum would lose the digits of a small one beside a large one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
        x = logits.float()
        peak = largest(x.amax(dim=-1), shard.axis)
        index = labels - shard.start
        # IGNORE is negative: inside nowhere. Sizes that are symbolic subtract, but do not compare with tensors.
        inside = (index >= 0) & (index - shard.size < 0)
        index = torch.where(inside, index, 0)
        mine = torch.where(inside, x.gather(-1, index[:, None])[:, 0] - peak, 0.0)
        total, target = all_reduce(torch.stack(((x - peak[:, None]).exp().sum(dim=-1), mine)), shard.axis)
        log_total = total.log()
        valid = labels != IGNORE
        ctx.save_for_backward(logits, peak, log_total, index, inside, valid)
        return torch.where(valid, log_total - target, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        logits, peak, log_total, index, inside, valid = ctx.saved_tensors
        out = (logits.float() - peak[:, None] - log_total[:, None]).exp()
        out = out.scatter_add(-1, index[:, None], -inside.float()[:, None])
        return (out * torch.where(valid, grad, 0.0)[:, None]).to(logits.dtype), None, None


@dataclass(frozen=True)
class Judge:
    """What is taken of each token's logits; the part that is worth compiling (`dataclasses.replace`)."""

    token_losses: TokenLosses = token_losses
    """Of all logits."""
    shard_losses: ShardLosses | None = None
    """The same, of a sharded vocabulary. None: there is no such way, so logits are gathered first."""

    def __call__(self, hidden: Tensor, labels: Tensor, project: Projection) -> Tensor:
        """Losses of tokens from their hidden states. # (tokens, dim), (tokens,) → (tokens,)"""
        if project.shard is None or self.shard_losses is None:
            return self.token_losses(project(hidden), labels)
        return self.shard_losses(project.local(hidden), labels, project.shard)


OURS = Judge(shard_losses=shard_losses)
"""Cross-entropy, with no more of the logits on a rank than its head gives."""


@dataclass(frozen=True)
class CrossEntropy:
    """Projects all tokens at once."""

    judge: Judge = OURS
    """What is taken of the logits."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """See LossFn. `head(hidden, apply)` must call `apply(hidden, project)` inside its forward."""
        labels = batch.labels.flatten()

        def apply(hidden: Tensor, project: Projection) -> Tensor:
            return self.judge(hidden.flatten(0, 1), labels, project)

        return _by_row(head(hidden, apply), batch.labels)


@dataclass(frozen=True)
class ChunkedCrossEntropy:
    """Projects `chunk_tokens` tokens at a time, in backward once more. Same values as CrossEntropy."""

    chunk_tokens: int
    """Tokens whose logits exist at one time."""
    judge: Judge = OURS
    """As in CrossEntropy."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """See LossFn. `head(hidden, apply)` must call `apply(hidden, project)` inside its forward."""
        labels = batch.labels.flatten().split(self.chunk_tokens)

        def apply(hidden: Tensor, project: Projection) -> Tensor:
            pieces = hidden.flatten(0, 1).split(self.chunk_tokens)  # one backward for all pieces, unlike slices
            return torch.cat([self._piece(h, y, project) for h, y in zip(pieces, labels, strict=True)])

        return _by_row(head(hidden, apply), batch.labels)

    def _piece(self, hidden: Tensor, labels: Tensor, project: Projection) -> Tensor:
        def of_piece(hidden: Tensor) -> Tensor:
            return self.judge(hidden, labels, project)

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
