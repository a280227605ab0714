"""Boxes of tensors out of safetensors: no more of a file than is needed, in runs of bytes that are not too short.

A box is rows of bytes with gaps. Rows that are shorter than a page, and gaps that are, are read with what lies beside
them, since a read costs more than its bytes then. What is quantized is dequantized as it is read (`hf_quantized`). A
large box is read in portions, so that import needs little memory beside the model's.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import BinaryIO, Self

import torch
from torch import Tensor

from components.checkpoint.links import Link, Span
from components.checkpoint.safetensors import FLOATS, Place, item_bytes, read_into
from components.checkpoint.storage import Folder
from components.runtime.errors import CheckpointError

_MIN_RUN = 4096  # bytes: a page of the disk's cache
_PORTION = 4 << 20  # elements
_TYPES: Mapping[str, str] = {**FLOATS, "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}


class OpenFiles:
    """Files of a folder, opened when they are first asked for; only the last few stay open."""

    _KEPT = 4

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: dict[str, tuple[BinaryIO, ExitStack]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _file, stack in self._open.values():
            stack.close()

    def file(self, name: str) -> BinaryIO:
        """A file of that name, anywhere. Raises OSError."""
        if name not in self._open:
            if len(self._open) == self._KEPT:
                self._open.pop(next(iter(self._open)))[1].close()
            stack = ExitStack()
            self._open[name] = stack.enter_context(self._folder.open(name)), stack
        return self._open[name][0]


def portions(link: Link) -> Iterator[Link]:
    """The link in pieces along the first dimension of theirs that it has more than one index of, small enough to be
    read at once."""
    span = math.prod(span.step * (span.count - 1) + 1 for span in link.their_part)
    dims = {link.across(dim): dim for dim in range(len(link.our_part))}
    dim = next((dims[at] for at, span in enumerate(link.their_part) if span.count > 1), None)
    if dim is None:
        yield link
        return
    count = link.our_part[dim].count
    size = max(1, count * _PORTION // span)
    for first in range(0, count, size):
        yield link.cut(dim, first, min(size, count - first))


def read_part(file: BinaryIO, place: Place, part: tuple[Span, ...]) -> Tensor:
    """Elements of a tensor in a file: of dimension d the indices `part[d]`. Raises CheckpointError if the file ends."""
    starts = [span.start for span in part]
    counts = [span.step * (span.count - 1) + 1 for span in part]
    box = _read_box(file, place, starts, counts)
    return box[tuple(slice(None, None, span.step) for span in part)]


def _read_box(file: BinaryIO, place: Place, starts: list[int], counts: list[int]) -> Tensor:
    outer, read_starts, read_counts = _runs(place, starts, counts)
    box = torch.empty(read_counts, dtype=getattr(torch, _TYPES[place.dtype]))
    raw = box.view(-1).view(torch.uint8).numpy().data
    strides = [math.prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
    run = len(raw) // math.prod(read_counts[:outer])
    for number, at in enumerate(itertools.product(*(range(count) for count in read_counts[:outer]))):
        first = sum((start + i) * stride for start, i, stride in zip(read_starts, at, strides, strict=False))
        first += sum(start * stride for start, stride in zip(read_starts[outer:], strides[outer:], strict=True))
        file.seek(place.start + first * item_bytes(place.dtype))
        if read_into(file, raw[number * run : (number + 1) * run]) < run:
            raise CheckpointError(f"{place.file} ended before its last tensor")
    inner = (slice(a - b, a - b + count) for a, b, count in zip(starts, read_starts, counts, strict=True))
    return box[tuple(inner)]


def _runs(place: Place, starts: list[int], counts: list[int]) -> tuple[int, list[int], list[int]]:
    """What to read for a box: how many dimensions to go through index by index, and the box, with its inner dimensions
    widened as long as runs of bytes, or what lies between two of them, would be short."""
    starts, counts = [*starts], [*counts]
    for dim in reversed(range(len(counts))):
        if counts[dim] == place.shape[dim]:
            continue
        run, row = (math.prod(sizes[dim:]) * item_bytes(place.dtype) for sizes in (counts, place.shape))
        if dim == 0 or (run >= _MIN_RUN and row - run >= _MIN_RUN):
            return dim, starts, counts
        starts[dim], counts[dim] = 0, place.shape[dim]
    return 0, starts, counts
