"""Import of Hugging Face weights: from safetensors into a model as it is laid out, each rank reading what it holds.

The family's table says which bytes of which file are which elements; everything is checked against it before the first
tensor is touched, and every element is counted afterwards, so that none stays at its initial value unnoticed. Loading
whole tensors and cutting them was rejected: with many ranks a host, each would read all of the model.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from components.checkpoint.boxes import Box, boxes_of
from components.checkpoint.hf_config import CONFIG, Adapter, parse_config
from components.checkpoint.hf_weights import PART
from components.checkpoint.links import Link, Shape, Span
from components.checkpoint.manifest import MANIFEST, read_manifest
from components.checkpoint.names import Table
from components.checkpoint.ranks import Ranks
from components.checkpoint.safetensors import FLOATS, Place, Places, item_bytes, read_into, read_places, some
from components.checkpoint.storage import Folder, open_folder, open_storage
from components.checkpoint.verifying import Verifier, Verify
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger

_MAX_CONFIG = 1 << 20
_MIN_RUN = 4096  # shorter runs of bytes are read with what lies between them: a page of the disk's cache


def load_hf(
    path: str,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    args: Any,
    ranks: Ranks,
    *,
    verify: Verify = "hashes",
) -> None:
    """Load Hugging Face weights into the model's tensors in place. Collective.

    `path`: a local folder or a URL, with config.json and model.safetensors or its index. `tensors`: what this rank
    holds of the model, as `model.<name>`; floating point types may differ from the file's. Raises CheckpointError on
    all ranks alike, before any tensor is touched, with everything that is missing, unexpected, misshapen, of another
    type, or different in config.json.
    """
    folder, what = open_folder(path), f"Hugging Face weights in '{path}'"
    if ranks.on_first(lambda: _is_export(folder), what):
        Verifier(open_storage(path), ranks, verify).require_whole(path)
    places, config = ranks.on_first(lambda: (read_places(folder), _read_config(folder)), what)
    shapes = _shapes_of_all(tensors, ranks, what)
    table = ranks.everywhere(lambda: adapter.table(args, shapes), what)
    boxes = ranks.everywhere(lambda: boxes_of(tensors), what)

    def check() -> None:
        problems = [f"{CONFIG}: {problem}" for problem in adapter.config_problems(config, args)]
        problems += _fit_problems(table, places) + _target_problems(tensors)
        if problems:
            raise CheckpointError("; ".join(problems))

    ranks.everywhere(check, f"{what} do not fit")
    mine = _links_of(table, boxes)
    ranks.everywhere(lambda: _check_copies(folder, table, places, mine), what)
    ranks.everywhere(lambda: _load(folder, places, mine, boxes, table), what)
    if ranks.first:
        kept = f"; left as initialized: {', '.join(sorted({*table.alone.values()}))}" if table.alone else ""
        logger.info("loaded %d tensors of Hugging Face weights from '%s'%s", len(table.theirs), path, kept)


def _is_export(folder: Folder) -> bool:
    """Whether there is a manifest to check the files against."""
    if MANIFEST not in folder.names():
        return False
    if (kind := read_manifest(folder).kind) != "hf":
        raise CheckpointError(f"it is a {kind} checkpoint of Espalier's: set checkpoint.initial_load_in_hf to false")
    return True


def _read_config(folder: Folder) -> dict[str, Any]:
    try:
        size = folder.size(CONFIG)
    except FileNotFoundError as error:
        raise CheckpointError(f"{CONFIG} is not there: without it nobody knows what the weights are of") from error
    if size > _MAX_CONFIG:
        raise CheckpointError(f"{CONFIG} has {size} bytes: more than {_MAX_CONFIG} are not read")
    with folder.open(CONFIG) as file:
        return parse_config(file.read(_MAX_CONFIG))


def _shapes_of_all(tensors: Mapping[str, Tensor], ranks: Ranks, what: str) -> dict[str, Shape]:
    """Names, without the part, and shapes of the whole model: with pipeline stages a rank has only some of it."""
    mine = {name.removeprefix(PART): tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes: dict[str, Shape] = {}
    for each in ranks.all_gather(mine):
        if differ := [name for name, shape in each.items() if shapes.get(name, shape) != shape]:
            raise CheckpointError(f"{what}: ranks have other shapes of {some(differ)}")
        shapes |= each
    return shapes


def _fit_problems(table: Table, places: Places) -> list[str]:
    """Why the files are not of this model; equal on all ranks."""
    missing = {*table.theirs} - {*places}
    unexpected = [name for name in {*places} - {*table.theirs} if table.extra(name) is None]
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"not expected: {some(unexpected)}"] if unexpected else []
    wrong = []
    for name in sorted({*table.theirs} & {*places}):
        place, shape = places[name], table.theirs[name]
        if place.shape != shape:
            wrong.append(f"{name} has shape {[*place.shape]}, this model {[*shape]}")
        if place.dtype not in FLOATS:
            wrong.append(f"{name} is of type {place.dtype}, which is not one of {', '.join(FLOATS)}")
    return problems + wrong[:20] + ([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else [])


def _target_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} is on the meta device here" for name, tensor in tensors.items() if tensor.is_meta]


def _links_of(table: Table, boxes: Mapping[str, Box]) -> list[Link]:
    """The links to what this rank holds, cut to it."""
    held = ((link, boxes[PART + link.ours]) for link in table.links if PART + link.ours in boxes)
    cut = (link.within(box.offsets, tuple(box.data.shape)) for link, box in held)
    return [link for link in cut if link is not None]


def _check_copies(folder: Folder, table: Table, places: Places, mine: list[Link]) -> None:
    """Raise CheckpointError if what must equal another tensor does not, in what this rank holds of that one."""
    copies = {extra.same_as: name for name in places if (extra := table.extra(name)) is not None and extra.same_as}
    for link in mine:
        if (copy := copies.get(link.theirs)) is None:
            continue
        first, second = places[link.theirs], places[copy]
        if (first.shape, first.dtype) != (second.shape, second.dtype) or not torch.equal(
            _read_alone(folder, first, link.their_part), _read_alone(folder, second, link.their_part)
        ):
            raise CheckpointError(f"{copy} is not the same as {link.theirs}, to which {CONFIG} ties it")


def _read_alone(folder: Folder, place: Place, part: tuple[Span, ...]) -> Tensor:
    with folder.open(place.file) as file:
        return read_part(file, place, part)


def _load(folder: Folder, places: Places, mine: list[Link], boxes: Mapping[str, Box], table: Table) -> None:
    counts = {name: 0 for name in boxes if name.removeprefix(PART) in table.ours}
    for link, found in _read_in_order(folder, places, mine):
        box = boxes[PART + link.ours]
        target = box.data[tuple(span.slice for span in link.our_part)]
        target.copy_(found.reshape(target.shape))
        counts[PART + link.ours] += link.count
    if left := [name for name, count in counts.items() if count != boxes[name].data.numel()]:
        raise CheckpointError(f"not all elements were loaded of {some(left)}")


def _read_in_order(folder: Folder, places: Places, links: Iterable[Link]) -> Iterator[tuple[Link, Tensor]]:
    """Each link with its elements, file by file from the front."""

    def place(link: Link) -> tuple[str, int]:
        return places[link.theirs].file, places[link.theirs].start

    for name, group in itertools.groupby(sorted(links, key=place), key=lambda link: places[link.theirs].file):
        with folder.open(name) as file:
            for link in group:
                yield link, read_part(file, places[link.theirs], link.their_part)


def read_part(file: BinaryIO, place: Place, part: tuple[Span, ...]) -> Tensor:
    """Elements of a tensor in a file: of dimension d the indices `part[d]`. Raises CheckpointError if the file ends."""
    starts = [span.start for span in part]
    counts = [span.step * (span.count - 1) + 1 for span in part]
    box = _read_box(file, place, starts, counts)
    return box[tuple(slice(None, None, span.step) for span in part)]


def _read_box(file: BinaryIO, place: Place, starts: list[int], counts: list[int]) -> Tensor:
    outer, read_starts, read_counts = _runs(place, starts, counts)
    box = torch.empty(read_counts, dtype=getattr(torch, FLOATS[place.dtype]))
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
    widened as long as runs of bytes would be short."""
    starts, counts = [*starts], [*counts]
    for dim in reversed(range(len(counts))):
        if counts[dim] == place.shape[dim]:
            continue
        if dim == 0 or math.prod(counts[dim:]) * item_bytes(place.dtype) >= _MIN_RUN:
            return dim, starts, counts
        starts[dim], counts[dim] = 0, place.shape[dim]
    return 0, starts, counts
