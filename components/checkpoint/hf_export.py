"""Export as Hugging Face safetensors: from the pieces of a saved checkpoint, tensor by tensor, in the order of the
files.

It reads what was saved rather than the live model: training is not held up, and any checkpoint can be exported later,
on any number of ranks. The files are planned from names and shapes alone, and dealt to the ranks whole, so that the
same bytes come out however many there are. A rank holds one tensor of theirs and the pieces of ours that it is made of.
Writing through the live model's shards was rejected: it needs a collective for each tensor.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.contents import read_files
from components.checkpoint.hf_assets import GENERATION, copied_files, generation_config, token_ids
from components.checkpoint.hf_config import CONFIG, Adapter
from components.checkpoint.hf_record import AS_IN_SOURCE, Record, missing_record, read_record
from components.checkpoint.hf_weights import PART, TheirWeights, original
from components.checkpoint.links import Shape
from components.checkpoint.manifest import FileEntry, Manifest, read_manifest, render
from components.checkpoint.names import Table
from components.checkpoint.ranks import Ranks, describe
from components.checkpoint.safetensors import FLOATS, INDEX, SINGLE, item_bytes, render_header
from components.checkpoint.storage import Folder, HashedFile, Storage, write_file
from components.checkpoint.tensors import Index
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger

SHARD_BYTES = 5_000_000_000
"""Largest file, as Hugging Face has it ("5GB"); a larger tensor gets one of its own."""
WORDS = {ours: theirs for theirs, ours in FLOATS.items()}
"""Names of types: torch's → the format's."""
MADE_OF = "exported_from"
"""Entry of a manifest's layout: a digest of the checkpoint's files and of how they were exported."""
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Shard:
    """A file to write."""

    name: str
    """Its name."""
    tensors: tuple[tuple[str, Shape, str], ...]
    """Their tensors in it, in order: name, shape, and type in the format's words."""


def plan_shards(tensors: Iterable[tuple[str, Shape, str]], shard_bytes: int) -> list[Shard]:
    """Fill files in the order of the tensors, up to `shard_bytes` of data each."""
    filled: list[list[tuple[str, Shape, str]]] = [[]]
    left = shard_bytes
    for name, shape, words in tensors:
        size = math.prod(shape) * item_bytes(words)
        if size > left and filled[-1]:
            filled.append([])
            left = shard_bytes
        filled[-1].append((name, shape, words))
        left -= size
    aligned = [tuple(sorted(each, key=lambda tensor: -item_bytes(tensor[2]))) for each in filled]
    if len(aligned) == 1:
        return [Shard(SINGLE, aligned[0])]
    count = len(aligned)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", each) for i, each in enumerate(aligned, 1)]


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """The index of several files."""
    total = sum(math.prod(shape) * item_bytes(words) for shard in shards for _, shape, words in shard.tensors)
    files = {name: shard.name for shard in shards for name, *_ in shard.tensors}
    return _json({"metadata": {"total_size": total}, "weight_map": files})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def export_hf(
    source: Folder,
    manifest: Manifest,
    target: Storage,
    name: str,
    adapter: Adapter,
    args: Any,
    *,
    dtype: str,
    ranks: Ranks,
    assets: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Folder:
    """Write the weights of a saved checkpoint as Hugging Face safetensors into the folder `name` of `target`.
    Collective.

    `source`, `manifest`: the checkpoint; its hashes are not checked here. `name`: `step-N`, like the checkpoint's.
    `args`: the model's arguments, as the job had them. `dtype`: "float16", "bfloat16", "float32", or "source", the
    types and tensors of the files that the weights were imported from. `assets`: a local folder whose tokenizer files
    and generation_config.json are copied. An export of that name with the same bytes stays; any other is set aside.
    Returns the folder. Raises CheckpointError on all ranks; nothing of that name appears then.
    """
    what, started = f"cannot export to '{target.path}/{name}'", time.perf_counter()
    index = ranks.on_first(lambda: read_files(source, manifest)[0], what)
    table = ranks.everywhere(lambda: _table(adapter, args, index), what)
    record = ranks.everywhere(lambda: _record(dtype, manifest, table), what)
    shards = ranks.everywhere(lambda: plan_shards(_in_order(table, record), shard_bytes), what)

    def small_files() -> dict[str, bytes]:
        ids = token_ids(assets)
        small = {CONFIG: adapter.config_bytes(args, record.dtype, ids), GENERATION: generation_config(ids)}
        small |= {INDEX: index_bytes(shards)} if shards[1:] else {}
        return {name: data for name, data in small.items() if name not in {path.name for path in copied_files(assets)}}

    small = ranks.everywhere(lambda: small_files() if ranks.first else {}, what)
    types = record.plain() if dtype == AS_IN_SOURCE else WORDS[dtype]
    made_of = ranks.on_first(lambda: _digest(manifest, types, shard_bytes, small, assets), what)
    if ranks.on_first(lambda: _make_way(target, name, made_of), what):
        return target.folder(name)
    temporary = ranks.on_first(lambda: target.temporary(name), what)
    try:
        weights = TheirWeights(source, index, table, record)
        entries = ranks.everywhere(
            lambda: [_write_shard(temporary, shard, weights) for shard in shards[ranks.rank :: ranks.size]], what
        )
        others = ranks.on_first(lambda: _write_small(temporary, small, assets), what)
        files = sorted([*others, *itertools.chain(*ranks.all_gather(entries))], key=lambda entry: entry.name)
        layout = {**manifest.layout, MADE_OF: made_of}
        described = render(replace(manifest, kind="hf", created=_now(), files=files, layout=layout))
        ranks.on_first(lambda: target.commit(temporary, name, described), what)
    except CheckpointError:
        if ranks.first:
            _discard(target, temporary)
        raise
    if ranks.first:
        _log(table, f"{target.path}/{name}", files, time.perf_counter() - started)
    return target.folder(name)


def _table(adapter: Adapter, args: Any, index: Index) -> Table:
    shapes = {name.removeprefix(PART): tuple(entry.shape) for name, entry in index.items() if name.startswith(PART)}
    table = adapter.table(args, shapes)
    saved = sum(math.prod(shape) for name, shape in shapes.items() if name not in table.buffers)
    expected = args.parameter_count()
    if saved != expected:
        raise CheckpointError(f"the checkpoint has {saved} parameters, this model.flavor {expected}")
    return table


def _record(dtype: str, manifest: Manifest, table: Table) -> Record:
    """The types to write."""
    if dtype != AS_IN_SOURCE:
        exact = {link.theirs: "float32" for link in table.links if link.ours in table.buffers}
        return Record(dtype, exact, [extra.theirs for extra in table.extras if extra.written])
    if (record := read_record(manifest.layout)) is None:
        raise CheckpointError(missing_record("export_dtype"))
    return record


def _in_order(table: Table, record: Record) -> list[tuple[str, Shape, str]]:
    """Their tensors in the order of ours, so that each piece of ours is read once; then those that equal others."""
    names = [*dict.fromkeys(link.theirs for link in table.links), *record.besides]
    return [(name, table.theirs[original(table, name)], WORDS[record.type_of(name)]) for name in names]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_shard(folder: Folder, shard: Shard, weights: TheirWeights) -> FileEntry:
    with folder.create(shard.name) as file:
        file.write(render_header(shard.tensors))
        for name, *_ in shard.tensors:
            _write_raw(file, weights.read(name))
    return file.entry


def _write_raw(file: HashedFile, tensor: Tensor) -> None:
    raw = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(raw), _CHUNK):
        file.write(raw[start : start + _CHUNK])


def _write_small(folder: Folder, small: Mapping[str, bytes], assets: str | None) -> list[FileEntry]:
    entries = [write_file(folder, name, data) for name, data in small.items()]
    return entries + [_copy(path, folder) for path in copied_files(assets)]


def _copy(path: Path, folder: Folder) -> FileEntry:
    with path.open("rb") as original, folder.create(path.name) as file:
        while data := original.read(_CHUNK):
            file.write(data)
    return file.entry


def _digest(manifest: Manifest, types: Any, shard_bytes: int, small: Mapping[str, bytes], assets: str | None) -> str:
    """What an export's bytes follow from."""
    files = [[entry.name, entry.size, entry.hashes] for entry in manifest.files]
    other = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    other |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in copied_files(assets)}
    return hashlib.sha256(_json({"files": files, "type": types, "shards": shard_bytes, "other": other})).hexdigest()


def _make_way(target: Storage, name: str, made_of: str) -> bool:
    """Whether this very export is there already. Another one is set aside, since not all storage can rename it
    later."""
    target.prepare()
    if not target.exists(name):
        return False
    try:
        there = read_manifest(target.folder(name))
    except CheckpointError:
        there = None
    if there and there.kind == "hf" and there.layout.get(MADE_OF) == made_of:
        logger.info("'%s/%s' is there already, exported from the same checkpoint: it stays as it is", target.path, name)
        return True
    if there and there.kind != "hf":
        raise CheckpointError(f"it is a {there.kind} checkpoint: set checkpoint.export_folder to another folder")
    aside = target.set_aside(name, "superseded")
    logger.warning("'%s/%s' was another export: it is now '%s'", target.path, name, aside)
    return False


def _discard(target: Storage, temporary: Folder) -> None:
    try:
        target.discard(temporary)
    except (OSError, CheckpointError) as error:
        logger.warning("%s: '%s' stays until the next export", describe(error), temporary.path)


def _log(table: Table, path: str, files: Sequence[FileEntry], seconds: float) -> None:
    left = f"; left out, since Hugging Face has no place for it: {', '.join(sorted({*table.alone.values()}))}"
    size = sum(entry.size for entry in files) / 1e6
    text = f"exported {len(table.theirs)} tensors to '{path}': {size:.1f} MB in {seconds:.2f} s"
    logger.info("%s%s", text, left if table.alone else "")
