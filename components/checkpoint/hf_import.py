"""Import of Hugging Face weights: from safetensors into a model as it is laid out, each rank reading what it holds.

The family's table says which bytes of which file are which elements; everything is checked against it before the first
tensor is touched, and every element is counted afterwards, so that none stays at its initial value unnoticed. Loading
whole tensors and cutting them was rejected: with many ranks a host, each would read all of the model.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.boxes import Box, boxes_of
from components.checkpoint.hf_config import CONFIG, Adapter, parse_config
from components.checkpoint.hf_quantized import read_source
from components.checkpoint.hf_read import OpenFiles, portions
from components.checkpoint.hf_record import Record, record_of
from components.checkpoint.hf_sources import Quantized, Source, Sources, find_sources, quantization
from components.checkpoint.hf_weights import PART
from components.checkpoint.links import Link, Shape
from components.checkpoint.manifest import MANIFEST, read_manifest
from components.checkpoint.names import Table
from components.checkpoint.ranks import Ranks
from components.checkpoint.safetensors import FLOATS, read_places, some
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
    quantized: bool = False,
) -> Record:
    """Load Hugging Face weights into the model's tensors in place. Collective.

    `path`: a local folder or a URL, with config.json and model.safetensors or its index. `tensors`: what this rank
    holds of the model, as `model.<name>`; floating point types may differ from the file's. `quantized`: weights are
    dequantized (`checkpoint.initial_load_in_hf_quantized`). Returns what an export in the files' own types needs to
    know of them. Raises CheckpointError on all ranks alike, before any tensor is touched, with everything that is
    missing, unexpected, misshapen, of another type, or different in config.json.
    """
    what = f"Hugging Face weights in '{path}'"
    shapes = _shapes_of_all(tensors, ranks, what)
    problems = _target_problems(tensors)
    found = open_hf(path, shapes, adapter, args, ranks, verify=verify, quantized=quantized, problems=problems)
    boxes = ranks.everywhere(lambda: boxes_of(tensors), what)
    ranks.everywhere(lambda: found.check_copies(boxes), what)
    ranks.everywhere(lambda: found.load(boxes), what)
    if ranks.first:
        _log(path, found.table, found.sources)
    return found.record


@dataclass(frozen=True)
class TheirFiles:
    """Hugging Face weights that have been found to be of a model."""

    folder: Folder
    """Where they are."""
    table: Table
    """Which of their elements are which of the model's."""
    sources: Sources
    """Where their tensors are."""

    @property
    def record(self) -> Record:
        """What an export in the files' own types needs to know of them."""
        return record_of(self.table, self.sources.found)

    def check_copies(self, boxes: Mapping[str, Box]) -> None:
        """Raise CheckpointError if what must equal another tensor does not, in these boxes of the model."""
        _check_copies(self.folder, self.table, self.sources.found, _links_of(self.table, boxes))

    def load(self, boxes: Mapping[str, Box]) -> None:
        """Fill boxes of the model, by `model.<name>`. Raises CheckpointError, OSError."""
        _load(self.folder, self.sources.found, _links_of(self.table, boxes), boxes, self.table)


def open_hf(
    path: str,
    shapes: Mapping[str, Shape],
    adapter: Adapter,
    args: Any,
    ranks: Ranks,
    *,
    verify: Verify = "hashes",
    quantized: bool | None = False,
    problems: Sequence[str] = (),
) -> TheirFiles:
    """Hugging Face weights, checked against the model whose tensors have these names, without the part, and shapes.
    Collective.

    See `load_hf` for the arguments; `quantized` = None: as config.json says. `problems`: what else is wrong on this
    rank, to be told with the rest. Raises CheckpointError on all ranks alike.
    """
    folder, what = open_folder(path), f"Hugging Face weights in '{path}'"
    if ranks.on_first(lambda: _is_export(folder), what):
        Verifier(open_storage(path), ranks, verify).require_whole(path)
    places, config = ranks.on_first(lambda: (read_places(folder), _read_config(folder)), what)
    table = ranks.everywhere(lambda: adapter.table(args, shapes), what)
    expected = quantization(config) is not None if quantized is None else quantized
    sources = find_sources(places, config, adapter.nested, expected)

    def check() -> None:
        wrong = [f"{CONFIG}: {problem}" for problem in adapter.config_problems(config, args)]
        wrong += [*sources.problems, *_fit_problems(table, sources.found), *problems]
        if wrong:
            raise CheckpointError("; ".join(wrong))

    ranks.everywhere(check, f"{what} do not fit")
    return TheirFiles(folder, table, sources)


def _log(path: str, table: Table, sources: Sources) -> None:
    count = sum(isinstance(source, Quantized) for source in sources.found.values())
    told = f", {count} of them quantized in the files" if count else ""
    told += f"; left as initialized: {', '.join(sorted({*table.alone.values()}))}" if table.alone else ""
    if left := [*sources.left_out, *(name for name in sources.found if table.leaves_out(name))]:
        told += f"; left out {len(left)} tensors of other parts: {some(left)}"
    logger.info("loaded %d tensors of Hugging Face weights from '%s'%s", len(table.theirs), path, told)


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
        raise CheckpointError(
            f"{CONFIG} is not there: without it nobody knows what the weights are of; put their own beside them"
        ) from error
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


def _fit_problems(table: Table, places: Mapping[str, Source]) -> list[str]:
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


def _check_copies(folder: Folder, table: Table, places: Mapping[str, Source], mine: list[Link]) -> None:
    """Raise CheckpointError if what must equal another tensor does not, in what this rank holds of that one."""
    copies = [(extra.same_as, name) for name in places if (extra := table.extra(name)) is not None and extra.same_as]
    for link, copy in ((link, copy) for link in mine for same, copy in copies if same == link.theirs):
        first, second = places[link.theirs], places[copy]
        with OpenFiles(folder) as files:
            same = (first.shape, first.dtype) == (second.shape, second.dtype) and all(
                torch.equal(*(read_source(files, source, part.their_part) for source in (first, second)))
                for part in portions(link)
            )
        if not same:
            raise CheckpointError(f"{copy} is not the same as {link.theirs}, of which it must be a copy")


def _load(
    folder: Folder, sources: Mapping[str, Source], mine: list[Link], boxes: Mapping[str, Box], table: Table
) -> None:
    counts = {name: 0 for name in boxes if name.removeprefix(PART) in table.ours}
    with OpenFiles(folder) as files:
        for link in _in_order(sources, mine):
            found = read_source(files, sources[link.theirs], link.their_part)
            target = boxes[PART + link.ours].data[tuple(span.slice for span in link.our_part)]
            target.copy_((found.transpose(-1, -2) if link.transposed else found).reshape(target.shape))
            counts[PART + link.ours] += link.count
    if left := [name for name, count in counts.items() if count != boxes[name].data.numel()]:
        raise CheckpointError(f"not all elements were loaded of {some(left)}")


def _in_order(sources: Mapping[str, Source], links: Iterable[Link]) -> list[Link]:
    """Portions of the links, in the order in which they lie in the files."""

    def place(link: Link) -> tuple[str, int, list[int]]:
        found = sources[link.theirs]
        return found.file, found.start, [span.start for span in link.their_part]

    return sorted(itertools.chain.from_iterable(map(portions, links)), key=place)
