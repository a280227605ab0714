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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.contents import read_files
from components.checkpoint.hf_config import CONFIG, Adapter
from components.checkpoint.hf_weights import PART, TheirWeights
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
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer; those that are there are copied."""
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
    tensors: tuple[tuple[str, Shape], ...]
    """Their tensors in it, in order."""


def plan_shards(shapes: Mapping[str, Shape], dtype: str, shard_bytes: int) -> list[Shard]:
    """Fill files in the order of the tensors, up to `shard_bytes` of data each."""
    filled: list[list[tuple[str, Shape]]] = [[]]
    left = shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes(dtype)
        if size > left and filled[-1]:
            filled.append([])
            left = shard_bytes
        filled[-1].append((name, shape))
        left -= size
    if len(filled) == 1:
        return [Shard(SINGLE, tuple(filled[0]))]
    count = len(filled)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", tuple(each)) for i, each in enumerate(filled, 1)]


def index_bytes(shards: Sequence[Shard], dtype: str) -> bytes:
    """The index of several files."""
    total = sum(math.prod(shape) * item_bytes(dtype) for shard in shards for _, shape in shard.tensors)
    files = {name: shard.name for shard in shards for name, _ in shard.tensors}
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
    `args`: the model's arguments, as the job had them. `dtype`: "float16", "bfloat16" or "float32". `assets`: a local
    folder whose tokenizer files are copied. An export of that name with the same bytes stays; any other is set aside.
    Returns the folder. Raises CheckpointError on all ranks; nothing of that name appears then.
    """
    what, started = f"cannot export to '{target.path}/{name}'", time.perf_counter()
    index, words = ranks.on_first(lambda: read_files(source, manifest)[0], what), WORDS[dtype]
    table = ranks.everywhere(lambda: _table(adapter, args, index), what)
    shards = plan_shards(_in_order(table), words, shard_bytes)
    small = {CONFIG: adapter.config_bytes(args, dtype)} | ({INDEX: index_bytes(shards, words)} if shards[1:] else {})
    made_of = ranks.on_first(lambda: _digest(manifest, words, shard_bytes, small, assets), what)
    if ranks.on_first(lambda: _make_way(target, name, made_of), what):
        return target.folder(name)
    temporary = ranks.on_first(lambda: target.temporary(name), what)
    try:
        weights = TheirWeights(source, index, table, dtype)
        entries = ranks.everywhere(
            lambda: [_write_shard(temporary, shard, weights, words) for shard in shards[ranks.rank :: ranks.size]], what
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
    saved = sum(math.prod(shape) for name, shape in table.ours.items() if name not in table.buffers)
    expected = args.parameter_count()
    if saved != expected:
        raise CheckpointError(f"the checkpoint has {saved} parameters, this model.flavor {expected}")
    return table


def _in_order(table: Table) -> dict[str, Shape]:
    """Their tensors in the order of ours, so that each piece of ours is read once."""
    return {name: table.theirs[name] for name in dict.fromkeys(link.theirs for link in table.links)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_shard(folder: Folder, shard: Shard, weights: TheirWeights, words: str) -> FileEntry:
    with folder.create(shard.name) as file:
        file.write(render_header(shard.tensors, words))
        for name, _ in shard.tensors:
            _write_raw(file, weights.read(name))
    return file.entry


def _write_raw(file: HashedFile, tensor: Tensor) -> None:
    raw = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(raw), _CHUNK):
        file.write(raw[start : start + _CHUNK])


def _write_small(folder: Folder, small: Mapping[str, bytes], assets: str | None) -> list[FileEntry]:
    entries = [write_file(folder, name, data) for name, data in small.items()]
    return entries + [_copy(path, folder) for path in tokenizer_files(assets)]


def _copy(path: Path, folder: Folder) -> FileEntry:
    with path.open("rb") as original, folder.create(path.name) as file:
        while data := original.read(_CHUNK):
            file.write(data)
    return file.entry


def _digest(manifest: Manifest, words: str, shard_bytes: int, small: Mapping[str, bytes], assets: str | None) -> str:
    """What an export's bytes follow from."""
    files = [[entry.name, entry.size, entry.hashes] for entry in manifest.files]
    other = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    other |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer_files(assets)}
    return hashlib.sha256(_json({"files": files, "type": words, "shards": shard_bytes, "other": other})).hexdigest()


def tokenizer_files(assets: str | None) -> list[Path]:
    """Those of a tokenizer in a local folder that are exported too."""
    found = [Path(assets) / name for name in ASSETS] if assets is not None else []
    return [path for path in found if path.is_file()]


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
