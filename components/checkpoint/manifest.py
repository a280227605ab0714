"""manifest.json: what a checkpoint consists of, and whose it is. Without a valid one a folder is no checkpoint.

The file's bytes are a function of its content (sorted keys, fixed layout) and reading compares them, so that not even a
changed blank passes. Its digest, like all hashes here, detects accidents; a forged manifest is still only data:
names are plain file names, numbers are bounded, nothing in it is run. Torch-free.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from components.checkpoint.hashing import ALGORITHM, CHUNK_BYTES, chunk_count
from components.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from components.checkpoint.storage import Folder

MANIFEST = "manifest.json"
FORMAT = 1
MAX_BYTES = 64 << 20
"""Of a manifest; hashes of 100 TB take as much."""
Kind = Literal["training", "model_only", "hf"]
Count = Annotated[int, Field(ge=0)]

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    """Its name in the folder; there are no sub-folders."""
    size: Count
    """Bytes."""
    hashes: list[str]
    """Hash of each chunk of `chunk_bytes`, the last one shorter."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: Count
    """Optimizer steps done when it was saved."""
    kind: Kind
    """training: everything that a resume needs; model_only: weights, in `checkpoint.export_dtype`;
    hf: an export, Hugging Face safetensors."""
    created: str
    """Time of saving, ISO 8601, UTC."""
    files: list[FileEntry]
    """All files but the manifest itself."""
    fingerprint: dict[str, Any]
    """Resolved value of every key that says what is computed, by dotted name."""
    layout: dict[str, Any]
    """How it ran: ranks, degrees of the mesh, batch split."""
    config: str
    """The resolved TOML."""
    versions: dict[str, str]
    """Versions of python, torch and espalier."""
    revision: str | None
    """Git revision of the code, if known."""
    hash: Literal["xxh3_128"] = ALGORITHM
    """Algorithm of `FileEntry.hashes`."""
    chunk_bytes: Annotated[int, Field(ge=1)] = CHUNK_BYTES
    """Bytes that one hash covers."""
    format: Literal[1] = FORMAT
    """Version of this format."""


_ADAPTER = TypeAdapter(Manifest)


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, digest included."""
    content = asdict(manifest)
    return _dump({**content, "digest": hashlib.sha256(_dump(content)).hexdigest()})


def parse(raw: bytes) -> Manifest:
    """The manifest that these bytes are. Raises CheckpointError with what is wrong in them."""
    try:
        content = json.loads(raw)
        found = content.get("format") if isinstance(content, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {found}, newer than {FORMAT}: read it with a newer Espalier")
        manifest = _ADAPTER.validate_json(raw, strict=True)
    except (ValueError, RecursionError) as error:  # ValidationError is a ValueError
        raise CheckpointError(f"{MANIFEST} is not a manifest ({_reason(error)})") from error
    if render(manifest) != raw:
        raise CheckpointError(f"{MANIFEST} has been changed: its digest does not match")
    if problems := _file_list_problems(manifest):
        raise CheckpointError(f"{MANIFEST}: " + "; ".join(problems))
    return manifest


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def _file_list_problems(manifest: Manifest) -> list[str]:
    names = [entry.name for entry in manifest.files]
    problems = [f"{name!r} is not a plain file name" for name in names if not is_plain(name)]
    problems += [f"{name!r} is listed twice" for name, count in sorted(Counter(names).items()) if count > 1]
    problems += [
        f"{entry.name!r} has {len(entry.hashes)} hashes for {entry.size} bytes"
        for entry in manifest.files
        if len(entry.hashes) != chunk_count(entry.size, manifest.chunk_bytes)
    ]
    return problems


def is_plain(name: str) -> bool:
    """True for a name that cannot lead out of its folder."""
    return bool(_PLAIN.fullmatch(name)) and name not in (".", "..", MANIFEST)


def read_manifest(folder: "Folder") -> Manifest:
    """The manifest of a checkpoint, checked, and the sizes of its files too (not their hashes).

    Raises CheckpointError with all that is wrong.
    """
    try:
        with folder.open(MANIFEST) as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"no {MANIFEST} in it: not a checkpoint of Espalier, or one that was never finished"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{MANIFEST} has more than {MAX_BYTES} bytes: not a manifest of Espalier")
    manifest = parse(raw)
    try:
        sizes = folder.sizes()
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}") from error
    if problems := [problem for entry in manifest.files if (problem := _size_problem(sizes.get(entry.name), entry))]:
        raise CheckpointError("; ".join(problems))
    return manifest


def _size_problem(size: int | None, entry: FileEntry) -> str | None:
    if size is None:
        return f"{entry.name} is missing"
    if size < 0:
        return f"{entry.name} is not a regular file"
    if size != entry.size:
        return f"{entry.name} has {size} bytes instead of {entry.size}"
    return None
