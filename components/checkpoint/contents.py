"""The files of one checkpoint: written into an empty folder, described for its manifest, read back. Names no step and
decides nothing: when a folder becomes a checkpoint is the business of `checkpointer` and `storage`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.checkpoint.boxes import Box
from components.checkpoint.hashing import chunk_count, hash_chunks
from components.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import require_plain
from components.checkpoint.storage import write_file
from components.checkpoint.tensors import INDEX, Index, parse_index, write_tensors
from components.runtime.errors import CheckpointError

STATE = "state.json"


def require_savable(tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks, what: str) -> None:
    """Raise CheckpointError for what could not be given back as it is, and for state that differs between ranks."""

    def digests() -> dict[str, str]:
        if wrong := sorted(name for name, value in tensors.items() if not isinstance(value, Tensor) or value.is_meta):
            raise CheckpointError(f"no tensors with memory: {', '.join(wrong)}")
        require_plain(state)
        return {part: hashlib.sha256(json.dumps(value).encode()).hexdigest() for part, value in state.items()}

    everyone = ranks.all_gather(ranks.everywhere(digests, what))
    parts = sorted({part for each in everyone for part in each})
    if differ := [part for part in parts if len({each.get(part) for each in everyone}) > 1]:
        raise CheckpointError(f"{what}: the state of {', '.join(differ)} differs between ranks")


def write_files(
    folder: Path, boxes: Mapping[str, Box], state: Mapping[str, Any], ranks: Ranks, what: str
) -> list[FileEntry]:
    """Write all files but the manifest, each on the disk at the end; size and hashes of each. Collective.

    Raises CheckpointError.
    """
    write_tensors(folder, boxes, ranks, what)
    ranks.on_first(lambda: write_file(folder / STATE, json.dumps(state).encode()), what)
    mine = ranks.everywhere(lambda: _describe(folder, ranks.rank), what)
    return sorted((entry for each in ranks.all_gather(mine) for entry in each), key=lambda entry: entry.name)


def _describe(folder: Path, rank: int) -> list[FileEntry]:
    """Size and hashes of the files that this rank wrote: its own are in its page cache."""
    names = [path.name for path in folder.glob(f"__{rank}_*.distcp")] + (
        [".metadata", INDEX, STATE] if rank == 0 else []
    )
    sizes = {name: (folder / name).stat().st_size for name in names}
    hashes = iter(hash_chunks([(folder / name, index) for name in names for index in range(chunk_count(sizes[name]))]))
    return [FileEntry(name, sizes[name], [next(hashes) for _ in range(chunk_count(sizes[name]))]) for name in names]


def read_files(folder: Path, manifest: Manifest) -> tuple[Index, dict[str, Any]]:
    """The index of the tensors and the state. Not collective. Raises CheckpointError, OSError."""
    sizes = {entry.name: entry.size for entry in manifest.files}
    if not {INDEX, STATE} <= {*sizes}:
        raise CheckpointError(f"{MANIFEST} lists no {INDEX} or no {STATE}")
    index = parse_index((folder / INDEX).read_bytes(), sizes)
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{STATE} is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} is not a JSON object")
    return index, state
