"""Import of Hugging Face weights: from safetensors into a model as it is laid out, each rank reading what it holds.

The family's table says which bytes of which file are which elements; everything is checked against it before the first
tensor is touched, and every element is counted afterwards, so that none stays at its initial value unnoticed. Loading
whole tensors and cutting them was rejected: with many ranks a host, each would read all of the model.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.boxes import Box, boxes_of
from components.checkpoint.hf_config import CONFIG, Adapter, parse_config
from components.checkpoint.hf_read import OpenFiles, portions, read_part
from components.checkpoint.hf_weights import PART
from components.checkpoint.links import Link, Shape
from components.checkpoint.manifest import MANIFEST, read_manifest
from components.checkpoint.names import Table
from components.checkpoint.ranks import Ranks
from components.checkpoint.safetensors import FLOATS, Places, read_places, some
from components.checkpoint.storage import Folder, open_folder, open_storage
from components.checkpoint.verifying import Verifier, Verify
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger

_MAX_CONFIG = 1 << 20


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
        with OpenFiles(folder) as files:
            same = (first.shape, first.dtype) == (second.shape, second.dtype) and all(
                torch.equal(*(read_part(files.file(place.file), place, part.their_part) for place in (first, second)))
                for part in portions(link)
            )
        if not same:
            raise CheckpointError(f"{copy} is not the same as {link.theirs}, to which {CONFIG} ties it")


def _load(folder: Folder, places: Places, mine: list[Link], boxes: Mapping[str, Box], table: Table) -> None:
    counts = {name: 0 for name in boxes if name.removeprefix(PART) in table.ours}
    with OpenFiles(folder) as files:
        for link in _in_order(places, mine):
            place = places[link.theirs]
            found = read_part(files.file(place.file), place, link.their_part)
            target = boxes[PART + link.ours].data[tuple(span.slice for span in link.our_part)]
            target.copy_((found.transpose(-1, -2) if link.transposed else found).reshape(target.shape))
            counts[PART + link.ours] += link.count
    if left := [name for name, count in counts.items() if count != boxes[name].data.numel()]:
        raise CheckpointError(f"not all elements were loaded of {some(left)}")


def _in_order(places: Places, links: Iterable[Link]) -> list[Link]:
    """Portions of the links, in the order in which they lie in the files."""

    def place(link: Link) -> tuple[str, int, list[int]]:
        found = places[link.theirs]
        return found.file, found.start, [span.start for span in link.their_part]

    return sorted(itertools.chain.from_iterable(map(portions, links)), key=place)
