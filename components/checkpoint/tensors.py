"""Tensors on disk: DCP's files and planners, under an index that is ours.

DCP (torch.distributed.checkpoint) cuts tensors into what each rank holds, writes one `.distcp` file a rank, and reads
into any other layout. Its own index, `.metadata`, is a pickle that runs code when it is loaded; it is still written, so
that other tools can read the folder, but never read here. `tensors.json` says the same and is checked before use: every
piece lies in a file of the checkpoint, and the pieces fill their tensor. Rejected: an allow-listing unpickler for
`.metadata`, which would bind us to DCP's private classes.

DCP's planners and storage are driven step by step, through their public interfaces, rather than by `dcp.save` and
`dcp.load`: those fall back to the pickle, and raise BaseExceptions.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from components.checkpoint.boxes import Box, LoadBoxes, SaveBoxes, boxes_of
from components.checkpoint.manifest import FileEntry
from components.checkpoint.ranks import Ranks
from components.checkpoint.storage import Folder, write_file
from components.runtime.errors import CheckpointError

INDEX = "tensors.json"
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the bytes that hold it."""

    offsets: list[Count]
    """Its first index in each dimension of the whole tensor."""
    sizes: list[Annotated[int, Field(ge=1)]]
    """Its length in each dimension."""
    file: str
    """Name of the file."""
    start: Count
    """First byte in the file."""
    length: Count
    """Number of bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, whole."""

    dtype: str
    """Name of its type, as in `torch.<dtype>`."""
    shape: list[Count]
    """Its global shape."""
    pieces: list[Piece]
    """What fills it, without overlap."""


Index = dict[str, TensorEntry]
_ADAPTER = TypeAdapter(Index)


@dataclass(frozen=True)
class _Location:
    """Where FileSystemReader finds a piece; it reads these attributes of whatever the metadata gives it."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class _Files(FileSystemBase):
    """A `Folder` as DCP's writer and reader want it, by plain names; knows what was written."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.written: list[FileEntry] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """A file of the folder. What DCP would rename when it is done is written under its last name at once."""
        if mode == "rb":
            with self._folder.open(str(path)) as stream:
                yield stream
            return
        with self._folder.create(str(path).removesuffix(".tmp")) as file:
            yield file
        self.written.append(file.entry)

    def concat_path(self, path: Any, suffix: str) -> Any:
        """The name alone."""
        return suffix

    def init_path(self, path: Any) -> Any:
        """As it is."""
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        """Done already, see `create_stream`."""

    def mkdir(self, path: Any) -> None:
        """The folder is there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """It is not asked: the folder was given."""
        return True

    def exists(self, path: Any) -> bool:
        """Nothing is: the folder is new."""
        return False

    def rm_file(self, path: Any) -> None:
        """There is none to remove, see `exists`."""


def write_tensors(folder: Folder, boxes: Mapping[str, Box], ranks: Ranks, what: str) -> list[FileEntry]:
    """Write what the ranks hold of the tensors, and their index, into an empty folder, each file on the disk at the
    end; the files that this rank wrote. Collective.

    Each rank writes what it holds; what several hold is written by one of them. Raises CheckpointError,
    starting with `what`.
    """
    alone = any(box.source is not None for box in boxes.values())  # the writer holds what it puts into one file
    writer = FileSystemWriter(folder.path, single_file_per_rank=not alone, sync_files=False, overwrite=False)
    files = _Files(folder)
    writer.fs = files  # pyrefly: ignore[bad-assignment]  # as torch's own fsspec writer does; it syncs when it closes
    planner = SaveBoxes(boxes)

    def plan_mine() -> Any:
        writer.set_up_storage_writer(ranks.first)
        planner.set_up_planner({}, writer.storage_meta(), ranks.first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.gather(ranks.everywhere(plan_mine, what))

    def plan_all() -> tuple[list[Any], Metadata]:
        planned, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(planned), metadata

    planned, metadata = ranks.everywhere(lambda: plan_all() if ranks.first else ([], None), what)
    plan = planner.finish_plan(ranks.scatter(planned))
    written = ranks.gather(ranks.everywhere(lambda: writer.write_data(plan, planner).wait(), what))
    index = ranks.on_first(lambda: _finish(folder, writer, metadata, written), what)
    return [*files.written, index] if ranks.first else files.written


def _finish(folder: Folder, writer: FileSystemWriter, metadata: Any, written: list[list[WriteResult]]) -> FileEntry:
    if folder.local:  # other tools read local folders only
        writer.finish(metadata, written)
    places = {result.index: result.storage_data for results in written for result in results}
    index = {name: asdict(_entry(name, entry, places)) for name, entry in metadata.state_dict_metadata.items()}
    return write_file(folder, INDEX, json.dumps(index, sort_keys=True).encode())


def _entry(name: str, entry: Any, places: Mapping[MetadataIndex, Any]) -> TensorEntry:
    pieces = []
    for chunk in entry.chunks:
        if chunk.sizes.numel():  # a rank whose shard is empty
            place = places[MetadataIndex(name, chunk.offsets)]
            pieces.append(Piece([*chunk.offsets], [*chunk.sizes], place.relative_path, place.offset, place.length))
    return TensorEntry(str(entry.properties.dtype).removeprefix("torch."), [*entry.size], pieces)


def parse_index(raw: bytes, sizes: Mapping[str, int], what: str = INDEX) -> Index:
    """The index that these bytes are, checked against the checkpoint's files (name → bytes). `what`: where they are
    from, for messages.

    Raises CheckpointError for a piece outside its tensor or its file, and for tensors that are not filled exactly.
    """
    try:
        index = _ADAPTER.validate_json(raw, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{what} is not an index of tensors: {error.errors()[0]['msg']}") from error
    if problems := [problem for name, entry in index.items() if (problem := _entry_problem(entry, sizes, name))]:
        raise CheckpointError(f"{what}: " + "; ".join(problems))
    return index


def _entry_problem(entry: TensorEntry, sizes: Mapping[str, int], name: str) -> str | None:
    if not isinstance(getattr(torch, entry.dtype, None), torch.dtype):
        return f"{name} has no type that torch knows ({entry.dtype!r})"
    for piece in entry.pieces:
        if piece.file not in sizes:
            return f"{name} lies in {piece.file!r}, which is no file of the checkpoint"
        if piece.start + piece.length > sizes[piece.file]:
            return f"{name} reaches beyond the end of {piece.file}"
        if not _is_inside(piece, entry.shape):
            return f"{name} has a piece outside its shape {entry.shape}"
    volume = sum(math.prod(piece.sizes) for piece in entry.pieces)
    if volume != math.prod(entry.shape) or _overlap(entry):
        return f"{name} is not filled exactly by its pieces"
    return None


def _overlap(entry: TensorEntry) -> bool:
    """Whether two pieces share an element. Compares neighbours along the dimension that is cut most often."""
    if len(entry.pieces) < 2:
        return False
    dim = max(range(len(entry.shape)), key=lambda d: len({piece.offsets[d] for piece in entry.pieces}))
    near: list[Piece] = []
    for piece in sorted(entry.pieces, key=lambda piece: piece.offsets[dim]):
        near = [other for other in near if other.offsets[dim] + other.sizes[dim] > piece.offsets[dim]]
        if any(_meet(piece, other) for other in near):
            return True
        near.append(piece)
    return False


def _meet(a: Piece, b: Piece) -> bool:
    ranges = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in ranges)


def _is_inside(piece: Piece, shape: list[int]) -> bool:
    if not len(piece.offsets) == len(piece.sizes) == len(shape):
        return False
    return all(offset + size <= length for offset, size, length in zip(piece.offsets, piece.sizes, shape, strict=True))


def target_problems(index: Index, tensors: Mapping[str, Tensor], cast: bool) -> list[str]:
    """Why the saved tensors cannot be loaded into these; a line each. With `cast`, floating point types may differ."""
    missing = sorted(set(tensors) - set(index))
    problems = [f"missing in the checkpoint: {', '.join(missing)}"] if missing else []
    for name in sorted(set(tensors) & set(index)):
        entry, target = index[name], tensors[name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if target.is_meta:
            problems.append(f"{name}: is on the meta device here, and has no memory to load into")
        if entry.shape != [*target.shape]:
            problems.append(f"{name}: shape {entry.shape} saved, {[*target.shape]} here")
        if dtype != target.dtype and not (cast and dtype.is_floating_point and target.is_floating_point()):
            problems.append(f"{name}: {entry.dtype} saved, {str(target.dtype).removeprefix('torch.')} here")
    return problems


def read_tensors(folder: Folder, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors in place; each rank reads what it holds. Not collective.

    The index has been checked against the files, and the tensors against it. DCP unpickles tensors with `weights_only`.
    """
    reader = FileSystemReader(folder.path)
    reader.fs = _Files(folder)  # pyrefly: ignore[bad-assignment]  # as torch's own fsspec reader does
    planner = LoadBoxes(boxes_of(tensors))
    metadata = _metadata({name: index[name] for name in tensors})
    planner.set_up_planner({}, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()
    if unfilled := planner.unfilled():
        raise CheckpointError(f"not filled by what was read: {', '.join(unfilled)}")


def _metadata(index: Index) -> Metadata:
    """DCP's form of the index."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _Location] = {}
    for name, entry in index.items():
        chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in entry.pieces]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        places |= {
            MetadataIndex(name, piece.offsets): _Location(piece.file, piece.start, piece.length)
            for piece in entry.pieces
        }
    return Metadata(entries, storage_data=places)
