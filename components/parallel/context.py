"""Context parallelism: ranks share each sequence.

Each rank has a part of every row, its positions, labels and document numbers with it; all but attention works on single
tokens and does not notice. Attention needs the keys of other ranks, and who may see whom goes by places in the whole
row. Three ways (`parallelism.context_parallel_rotate_method`), with h, g query and key heads, n ranks, s tokens a row:

    allgather  every rank gathers all keys and values: 2·g·s·head_dim of memory, one transfer that compute waits for
    alltoall   a ring: they pass by rank after rank, hidden behind compute; the least memory, n − 1 smaller transfers
    ulysses    tokens of all heads are traded for whole rows of some heads, and back: (2h + 2g)·s·head_dim / n move, the
               least for many ranks; heads limit the ranks

Tiles of attention that causality empties are not computed. Masks (for documents, windows, chunks, or where the rank is
symbolic) are built once per forward: s²/n bytes a row, or s² for ulysses; with a mask, allgather computes all of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.config.parallelism import Parallelism
from components.mesh.batch import Batch, Part
from components.mesh.collectives import Axis, all_to_all, gather, piece
from components.mesh.plan import Plan
from components.mesh.tiled_attention import Tiling
from components.parallel.chunks import Deal
from components.parallel.modules import find
from components.runtime.errors import MeshError

Attend = Callable[..., Tensor]
"""`InnerAttention.forward`."""

MakeMask = Callable[..., Tensor | None]
"""`AttentionMask.forward`."""


def split_sequence(batch: Batch, axis: Axis | None, config: Parallelism) -> Batch:
    """This rank's part of each row: every tensor of the batch cut along the sequence.

    Args:
        batch: Whole rows, the same on all ranks of the axis. Their length is a multiple of the number of chunks
            (`trainer.config.validate` sees to it).
        axis: The ranks; None: one, which has everything.
        config: For `context_parallel_load_balancer`.
    """
    if axis is None:
        return batch
    deal = _deal(axis, config)
    return batch.map(lambda x: deal.cut(x, 1))


def share_sequence(model: nn.Module, plan: Plan, axis: Axis | None, config: Parallelism) -> None:
    """Make the attention of a model, or of a pipeline stage, work on rows that `split_sequence` has cut. In place.

    Raises MeshError if the plan names no attention.
    """
    if axis is None:
        return
    if not plan.attention or not plan.mask:
        raise MeshError(
            f"parallelism.context_parallel_degree = {axis.size}: {type(model).__name__} has no plan for context"
            " parallelism: set it to 1"
        )
    deal, method = _deal(axis, config), config.context_parallel_rotate_method
    for module in find(model, (plan.mask,)).values():
        module.forward = (_ulysses_mask if method == "ulysses" else _local_mask)(module.forward, deal)
    for module in find(model, plan.attention).values():
        module.forward = _ATTENTION[method](module.forward, deal)


def _deal(axis: Axis, config: Parallelism) -> Deal:
    return Deal(axis, headtail=config.context_parallel_load_balancer == "headtail")


def _part(deal: Deal, length: int, device: torch.device) -> Part:
    """Which part of each row this rank's `length` tokens are."""
    return Part(
        deal.indices(length, device),
        length * deal.axis.size,
        lambda x: deal.to_row_order(gather(x, 1, deal.axis), 1),
    )


def _local_mask(make: MakeMask, deal: Deal) -> MakeMask:
    """The mask of this rank's queries against whole rows. # (rows, seq / n) → (rows or 1, 1, seq / n, seq)"""

    def forward(positions: Tensor, document_ids: Tensor | None) -> Tensor | None:
        return make(positions, document_ids, _part(deal, positions.shape[1], positions.device))

    return forward


def _ulysses_mask(make: MakeMask, deal: Deal) -> MakeMask:
    """The mask of whole rows, as without context parallelism."""

    def forward(positions: Tensor, document_ids: Tensor | None) -> Tensor | None:
        if document_ids is None:  # then only their shape matters
            return make(positions.repeat(1, deal.axis.size), None)
        whole = _part(deal, positions.shape[1], positions.device).whole
        return make(whole(positions), whole(document_ids))

    return forward


def _gathered(attend: Attend, deal: Deal) -> Attend:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        k, v = (deal.to_row_order(gather(x, 2, deal.axis), 2) for x in (k, v))
        if mask is None and _symbolic(deal.axis):
            mask = _part(deal, q.shape[2], q.device).not_later()[None, None]
        if mask is None:
            return attend(q, k, v, None, sinks, Tiling((deal.whole(q.shape[2]),)))
        return attend(q, k, v, mask, sinks)

    return forward


def _ring(attend: Attend, deal: Deal) -> Attend:
    if _symbolic(deal.axis):  # all ranks in one process: who sends to whom cannot be said in integers
        return _gathered(attend, deal)

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        return attend(q, k, v, mask, sinks, Tiling(deal.steps(q.shape[2]), deal.axis))

    return forward


def _ulysses(attend: Attend, deal: Deal) -> Attend:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        k, v = (_spread(x, q.shape[1], deal.axis.size) for x in (k, v))
        q, k, v = (_to_heads(x, deal) for x in (q, k, v))
        # The other heads' gradients are on the other ranks; data parallelism, which includes these ranks, adds them.
        mine = None if sinks is None else piece(sinks, 0, deal.axis)
        return _to_tokens(attend(q, k, v, mask, mine), deal)

    return forward


_ATTENTION = {"allgather": _gathered, "alltoall": _ring, "ulysses": _ulysses}


def _symbolic(axis: Axis) -> bool:
    return not isinstance(axis.rank, int)


def _spread(x: Tensor, heads: int, ranks: int) -> Tensor:
    """Key or value heads repeated until they can be dealt to ranks, as few times as the query groups allow."""
    kv_heads = x.shape[1]
    if heads % ranks:
        raise MeshError(
            f"parallelism.context_parallel_degree = {ranks}: must divide the {heads} heads of a rank with"
            ' context_parallel_rotate_method = "ulysses"; take a divisor, or "allgather"'
        )
    group = heads // kv_heads
    times = next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _to_heads(x: Tensor, deal: Deal) -> Tensor:
    """# (rows, heads, seq / n, head_dim) → (rows, heads / n, seq, head_dim) in row order"""
    n = deal.axis.size
    dealt = x.unflatten(1, (n, -1)).movedim(1, 0)
    received = all_to_all(dealt, [1] * n, [1] * n, deal.axis)  # (n: of which tokens, rows, heads / n, seq / n, ...)
    return deal.to_row_order(received.movedim(0, 2).flatten(2, 3), 2)


def _to_tokens(x: Tensor, deal: Deal) -> Tensor:
    """The inverse of `_to_heads`."""
    n = deal.axis.size
    dealt = deal.to_rank_order(x, 2).unflatten(2, (n, -1)).movedim(2, 0)
    received = all_to_all(dealt, [1] * n, [1] * n, deal.axis)  # (n: of which heads, rows, heads / n, seq / n, ...)
    return received.movedim(0, 1).flatten(1, 2)
