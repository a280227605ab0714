"""Copies in host memory of what a rank saves, so that training goes on while they are written.

The price is that memory: a second copy of what this rank writes, kept from save to save, since allocating it anew would
take longer than filling it. Of pieces that several ranks hold alike (replicas) only the one rank that writes a piece
copies it; that is dealt out once per layout, not per save. Pinned memory makes copies from an accelerator faster, but
cannot be swapped out, and torch rounds each of its blocks up to a power of two.

Rejected: to write from the live tensors and hold back only the optimizer step. A save takes longer than a step.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from components.checkpoint.boxes import Box, as_boxes, require_held, stored_type
from components.checkpoint.ranks import Ranks

Places = dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]
"""Name → offsets, sizes and bytes of this rank's box."""


@torch.no_grad()
def stage(
    boxes: Mapping[str, Box],
    *,
    pinned: bool,
    after: torch.Event | None = None,
    into: Mapping[str, Box] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Box]:
    """Copies of the boxes, each in memory of its own on the host; done when this returns.

    `after`: when their values are there, on the accelerator; None: when the current stream gets there. `into`: earlier
    copies, which are written over where they fit. `dtype`: type of the copies of floating point values; None: as it is.
    Raises CheckpointError for values that it cannot hold.
    """
    earlier = into or {}
    copies = {name: _room(box, earlier.get(name), pinned, dtype) for name, box in boxes.items()}
    side = _side_stream(boxes, after)
    with side or nullcontext():
        for name, box in boxes.items():
            copies[name].data.copy_(box.data, non_blocking=pinned)
    if side is not None:
        side.synchronize()
    for name, box in boxes.items():
        require_held(name, box.data, copies[name].data)
    return copies


def _room(box: Box, earlier: Box | None, pinned: bool, dtype: torch.dtype | None) -> Box:
    """A box of the same place to copy to."""
    wanted = stored_type(box.data, dtype)
    if earlier is not None and (earlier.data.shape, earlier.data.dtype) == (box.data.shape, wanted):
        return Box(earlier.data, box.offsets, box.shape)
    return Box(torch.empty(box.data.shape, dtype=wanted, pin_memory=pinned), box.offsets, box.shape)


def _side_stream(boxes: Mapping[str, Box], after: torch.Event | None) -> torch.Stream | None:
    """A stream of the boxes' accelerator, where copies wait for nothing but `after`; None on a CPU."""
    device = next((box.data.device for box in boxes.values() if box.data.device.type != "cpu"), None)
    if device is None:
        return None
    side = torch.Stream(device)
    if after is None:
        side.wait_stream(torch.accelerator.current_stream(device))
    else:
        side.wait_event(after)
    return side


def share_out(boxes: Mapping[str, Box], ranks: Ranks) -> set[str]:
    """Names of those boxes that this rank writes: what several hold alike, only one of them. Collective."""
    return ranks.scatter(_deal(ranks.gather(_places(boxes))))


def _places(boxes: Mapping[str, Box]) -> Places:
    return {name: (box.offsets, tuple(box.data.shape), box.data.nbytes) for name, box in boxes.items()}


def _deal(held: list[Places]) -> list[set[str]]:
    """Each rank's names: a piece goes to that of its holders which has the fewest bytes so far."""
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, places in enumerate(held):
        for name, (offsets, _, _) in places.items():
            holders.setdefault((name, offsets), []).append(rank)
    dealt: list[set[str]] = [set() for _ in held]
    load = [0] * len(held)
    for (name, _), among in holders.items():
        rank = min(among, key=load.__getitem__)
        dealt[rank].add(name)
        load[rank] += held[rank][name][2]
    return dealt


class Stage:
    """The host memory of one rank. A `take` writes over what the one before has given."""

    def __init__(self, ranks: Ranks, *, pinned: bool) -> None:
        self._ranks, self._pinned = ranks, pinned
        self._places: Places | None = None
        self._mine: set[str] = set()
        self._copies: dict[str, Box] = {}

    def take(
        self, tensors: Mapping[str, Tensor | Box], after: torch.Event | None, dtype: torch.dtype | None, what: str
    ) -> dict[str, Box]:
        """Copies of what this rank will write, over those of before. Collective.

        Raises CheckpointError on all ranks, starting with `what`, if one has no memory for them, or values that `dtype`
        cannot hold.
        """
        boxes = self._ranks.everywhere(lambda: as_boxes(tensors), what)
        places = _places(boxes)
        if any(self._ranks.all_gather(places != self._places)):
            self._mine, self._places = share_out(boxes, self._ranks), places
        mine = {name: box for name, box in boxes.items() if name in self._mine}
        copies = self._ranks.everywhere(
            lambda: stage(mine, pinned=self._pinned, after=after, into=self._copies, dtype=dtype), what
        )
        self._copies |= copies  # what is not of this save, as of weights alone, is kept for the next
        return copies
