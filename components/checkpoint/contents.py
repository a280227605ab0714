"""The files of one checkpoint: written into an empty folder, described for its manifest, read back. Names no step and
decides nothing: when a folder becomes a checkpoint is the business of `checkpointer` and `storage`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from components.checkpoint.boxes import Box
from components.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import require_plain
from components.checkpoint.storage import Folder, read_file, write_file
from components.checkpoint.tensors import INDEX, Index, parse_index, write_tensors
from components.runtime.errors import CheckpointError

STATE = "state.json"


def require_savable(tensors: Mapping[str, Tensor | Box], state: Mapping[str, Any], ranks: Ranks, what: str) -> None:
    """Raise CheckpointError for what could not be given back as it is, and for state that differs between ranks."""

    def digests() -> dict[str, str]:
        if wrong := sorted(name for name, value in tensors.items() if not _has_memory(value)):
            raise CheckpointError(f"no tensors with memory: {', '.join(wrong)}")
        require_plain(state)
        return {part: hashlib.sha256(json.dumps(value).encode()).hexdigest() for part, value in state.items()}

    everyone = ranks.all_gather(ranks.everywhere(digests, what))
    parts = sorted({part for each in everyone for part in each})
    if differ := [part for part in parts if len({each.get(part) for each in everyone}) > 1]:
        raise CheckpointError(f"{what}: the state of {', '.join(differ)} differs between ranks")


def _has_memory(value: Tensor | Box) -> bool:
    if isinstance(value, Box) and value.source is not None:
        return True
    data = value.data if isinstance(value, Box) else value
    return isinstance(data, Tensor) and not data.is_meta


def write_files(
    folder: Folder, boxes: Mapping[str, Box], state: Mapping[str, Any], ranks: Ranks, what: str
) -> list[FileEntry]:
    """Write all files but the manifest, each on the disk at the end. Collective.

    On rank 0 size and hashes of each, which is where the manifest is written; nothing elsewhere. Raises
    CheckpointError.
    """
    mine = write_tensors(folder, boxes, ranks, what)
    common = ranks.on_first(lambda: write_file(folder, STATE, json.dumps(state).encode()), what)
    everyone = ranks.gather([common, *mine] if ranks.first else mine)
    return sorted((entry for each in everyone for entry in each), key=lambda entry: entry.name)


def read_files(folder: Folder, manifest: Manifest) -> tuple[Index, dict[str, Any]]:
    """The index of the tensors and the state. Not collective. Raises CheckpointError, OSError."""
    sizes = {entry.name: entry.size for entry in manifest.files}
    if not {INDEX, STATE} <= {*sizes}:
        raise CheckpointError(f"{MANIFEST} lists no {INDEX} or no {STATE}")
    index = parse_index(read_file(folder, INDEX), sizes)
    try:
        state = json.loads(read_file(folder, STATE))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{STATE} is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} is not a JSON object")
    return index, state
