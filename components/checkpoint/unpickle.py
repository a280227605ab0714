"""`.metadata` of torch's distributed checkpoints: a pickle, read without running anything in it.

A pickle is a program: it names classes and functions, and calls them. Here every name that it may say stands for a
plain record of ours, or for a type of torch's; any other is refused by its name, so that a forged file can make
nothing but records. torch's own classes are not used either: they are private in part, and change between versions.
What the records say is then turned into an index like that of our own checkpoints, and checked like one: every piece
in a file of the folder, every tensor filled exactly.
"""

import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from components.checkpoint.storage import Folder
from components.checkpoint.tensors import Index, Piece, TensorEntry, parse_index
from components.runtime.errors import CheckpointError

METADATA = ".metadata"
_MAX_BYTES = 1 << 30
_MAX_OBJECT = 1 << 24
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
_PLAIN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _Record:
    """What an object of the pickle said of itself."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """One of its fields. Raises CheckpointError."""
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise CheckpointError(f"{METADATA}: a {self.kind} without {name}")
        return state[name]


class _Reader(pickle.Unpickler):
    """Makes records of the names that are allowed, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Raises CheckpointError for one that is not allowed."""
        if name in _RECORDS.get(module, ()):
            return type(name, (_Record,), {"kind": name})
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"{METADATA} names {module}.{name}, which is nothing of a checkpoint's: it is not read")


@dataclass(frozen=True)
class Saved:
    """A value that is no tensor: the bytes that hold it."""

    file: str
    """Name of the file."""
    start: int
    """First byte."""
    length: int
    """Number of bytes."""


@dataclass(frozen=True)
class Contents:
    """What a distributed checkpoint holds."""

    tensors: Index
    """Its tensors."""
    objects: dict[str, Saved] = field(default_factory=dict)
    """Everything else, by name."""

    def value(self, folder: Folder, name: str) -> Any:
        """A value that is no tensor, read with `weights_only`. Raises CheckpointError, OSError."""
        place = self.objects[name]
        if place.length > _MAX_OBJECT:
            raise CheckpointError(f"{name} has {place.length} bytes: more than {_MAX_OBJECT} are not read")
        with folder.open(place.file) as file:
            file.seek(place.start)
            raw = file.read(place.length)
        try:
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{place.file} holds nothing that can be read safely for {name}") from error


def read_contents(folder: Folder) -> Contents:
    """What a checkpoint of torch's holds, by its `.metadata`. Runs no code of it.

    Raises CheckpointError for a folder that is none, for a name that is not allowed, and for what does not fit its
    files; OSError.
    """
    sizes = folder.sizes()
    if METADATA not in folder.names():
        raise CheckpointError(f"'{folder.path}': no {METADATA} in it: not a distributed checkpoint of torch's")
    with folder.open(METADATA) as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise CheckpointError(f"{METADATA} has more than {_MAX_BYTES} bytes: it is not read")
    try:
        return _contents(_Reader(io.BytesIO(raw)).load(), sizes)
    except CheckpointError:
        raise
    except Exception as error:  # the bytes may be anything, and so may what unpickling them raises
        raise CheckpointError(f"{METADATA} is not readable ({type(error).__name__}: {error})") from error


def _contents(metadata: Any, sizes: Mapping[str, int]) -> Contents:
    places: dict[tuple[str, tuple[int, ...] | None], Saved] = {}
    for index, info in _record(metadata, "Metadata").get("storage_data").items():
        name, offset = index.get("fqn"), index.state.get("offset")  # of what is no tensor there is none
        places[name, None if offset is None else tuple(offset)] = _place(_record(info, "_StorageInfo"))
    tensors, objects = dict[str, TensorEntry](), dict[str, Saved]()
    for name, entry in metadata.get("state_dict_metadata").items():
        if entry.kind == "TensorStorageMetadata":
            tensors[name] = _tensor(name, entry, places)
        else:
            objects[name] = places[name, None]
    if stray := [name for name, place in objects.items() if place.start + place.length > sizes.get(place.file, -1)]:
        raise CheckpointError(f"{METADATA}: {stray[0]} lies beyond the end of a file, or in none of the folder")
    raw = json.dumps({name: asdict(entry) for name, entry in tensors.items()}).encode()
    return Contents(parse_index(raw, sizes, METADATA), objects)


def _record(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or value.kind != kind:
        raise CheckpointError(f"{METADATA} holds no {kind} where one must be")
    return value


def _place(info: _Record) -> Saved:
    if isinstance(info.state, dict) and info.state.get("transform_descriptors"):
        raise CheckpointError(f"{METADATA}: its tensors are transformed (compressed, say): they are not read")
    place = Saved(info.get("relative_path"), info.get("offset"), info.get("length"))
    if not all(type(number) is int and number >= 0 for number in (place.start, place.length)):
        raise CheckpointError(f"{METADATA}: a place in a file is no number of bytes")
    return place


def _tensor(name: str, entry: _Record, places: Mapping[Any, Saved]) -> TensorEntry:
    pieces = []
    for chunk in entry.get("chunks"):
        offsets, lengths = [*chunk.get("offsets")], [*chunk.get("sizes")]
        if 0 not in lengths:  # of a rank whose part is empty
            place = places[name, tuple(offsets)]
            pieces.append(Piece(offsets, lengths, place.file, place.start, place.length))
    dtype = _record(entry.get("properties"), "TensorProperties").state[0]
    return TensorEntry(str(dtype).removeprefix("torch."), [*entry.get("size")], pieces)
