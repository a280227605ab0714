"""Multi-token prediction (DeepSeek-V3, 2024, section 2.2): labels further ahead, and what they add to the objective.

Module k of D predicts, at each token i that has it, the label of token i + k. The sum of these losses over the global
batch, L_k, is divided by what the main loss is divided by: the valid labels of the global batch. The objective is

    main + coefficient / D · Σ_k L_k

and the reported loss stays the main one: what is added has the value 0 and the modules' gradient. Dividing L_k by its
own labels was rejected: a label's weight would depend on how documents fall into rows. A label counts for module k if
it counts for the main loss and stands k places further in the same row and, but with `data.cross_document_labels`, in
the same document.

The modules' hidden states come as further rows below the main ones, so that any loss serves them, in one call of the
head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.loss.cross_entropy import LossFn
from components.mesh.batch import IGNORE, Batch, RowLoss


def look_ahead(batch: Batch, depth: int, documents: bool) -> Batch:
    """The same batch with `ahead_tokens` and `ahead_labels` for so many modules. Call it with whole rows.

    `documents`: labels do not cross their borders. Beyond a row tokens are 0.
    """
    tokens, labels = [], []
    for places in range(1, depth + 1):
        label = _later(batch.labels, places, IGNORE)
        if documents:
            same = _later(batch.document_ids, places, -1) == batch.document_ids
            label = torch.where(same, label, IGNORE)
        tokens.append(_later(batch.tokens, places, 0))
        labels.append(label)
    plain = (batch.tokens, batch.labels, batch.positions, batch.document_ids)
    return Batch(*plain, torch.stack(tokens, dim=-1), torch.stack(labels, dim=-1))


def _later(x: Tensor, places: int, beyond: int) -> Tensor:
    """What stands so many places later in each row. # (rows, seq)"""
    there = x[:, places:]
    return F.pad(there, (0, x.shape[1] - there.shape[1]), value=beyond)


@dataclass(frozen=True)
class AheadLoss:
    """A loss, and what multi-token prediction adds to its gradient; without `ahead_labels` the loss itself."""

    loss: LossFn
    """The loss of rows."""
    coefficient: float
    """Weight of all modules together."""

    def __call__(self, hidden: Tensor, head: nn.Module, batch: Batch) -> RowLoss:
        """See LossFn, but `hidden` has the rows of the batch, then as many for each module."""
        if batch.ahead_labels is None:
            return self.loss(hidden, head, batch)
        sums, counts = self.loss(hidden, head, _longer(batch, batch.ahead_labels))
        main, *modules = sums.split(batch.rows)
        added = self.coefficient / len(modules) * torch.stack(modules).sum(0)
        return RowLoss(main + (added - added.detach()), counts[: batch.rows])


def _longer(batch: Batch, labels: Tensor) -> Batch:
    """The batch once for the main loss, and once for each module with its labels."""
    times = 1 + labels.shape[-1]
    same = (x.repeat(times, 1) for x in (batch.tokens, batch.positions, batch.document_ids))
    tokens, positions, documents = same
    return Batch(tokens, torch.cat((batch.labels, *labels.unbind(-1))), positions, documents)
