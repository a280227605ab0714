"""Their tensors out of the pieces of a checkpoint of ours, one at a time."""

import io
import pickle
from typing import BinaryIO, cast

import torch
from torch import Tensor

from components.checkpoint.boxes import require_held
from components.checkpoint.hf_record import Record
from components.checkpoint.links import Link
from components.checkpoint.names import Table
from components.checkpoint.safetensors import read_into
from components.checkpoint.storage import Folder
from components.checkpoint.tensors import Index, Piece, TensorEntry
from components.runtime.errors import CheckpointError

PART = "model."
"""What the names of a model's tensors begin with in a checkpoint."""


class TheirWeights:
    """Their tensors, one at a time, out of the pieces of a checkpoint, in the types that the record says."""

    def __init__(self, source: Folder, index: Index, table: Table, record: Record) -> None:
        self._source, self._index, self._table, self._record = source, index, table, record
        self._links: dict[str, list[Link]] = {}
        for link in table.links:
            self._links.setdefault(link.theirs, []).append(link)
        self._pieces: dict[tuple[str, int], Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One of theirs, whole. Raises CheckpointError where the type that is written cannot hold a value."""
        same = original(self._table, name)
        links = self._links[same]
        needed = {link.ours for link in links}
        self._pieces = {key: piece for key, piece in self._pieces.items() if key[0] in needed}
        whole = torch.empty(self._table.theirs[same], dtype=getattr(torch, self._record.type_of(name)))
        for link in links:
            for number, piece in enumerate(self._index[PART + link.ours].pieces):
                if (cut := link.within(tuple(piece.offsets), tuple(piece.sizes))) is not None:
                    self._fill(whole, cut, number)
        return whole

    def _fill(self, whole: Tensor, cut: Link, number: int) -> None:
        values = self._piece(cut.ours, number)[tuple(span.slice for span in cut.our_part)]
        target = whole[tuple(span.slice for span in cut.their_part)]
        target = target.transpose(-1, -2) if cut.transposed else target
        target.copy_(values.reshape(target.shape))
        require_held(cut.theirs, values, target)

    def _piece(self, name: str, number: int) -> Tensor:
        if (name, number) not in self._pieces:
            entry = self._index[PART + name]
            self._pieces[name, number] = read_piece(self._source, entry, entry.pieces[number])
        return self._pieces[name, number]


def original(table: Table, name: str) -> str:
    """The tensor of the table that one of theirs is, or equals."""
    if name in table.theirs:
        return name
    extra = table.extra(name)
    if extra is None or extra.same_as not in table.theirs:
        raise CheckpointError(f"{name} equals no tensor of this model")
    return extra.same_as


class _Section(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyrefly: ignore[bad-override]  # no buffer type in Python 3.11
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        found = read_into(self._file, view)
        self._at += found
        return found


def read_piece(folder: Folder, entry: TensorEntry, piece: Piece) -> Tensor:
    """A piece of a saved tensor. No code runs: DCP's files hold what `torch.save` writes, read with `weights_only`.

    Raises CheckpointError if the file holds something else there, OSError.
    """
    with folder.open(piece.file) as file:
        try:
            section = cast(BinaryIO, _Section(file, piece.start, piece.length))
            value = torch.load(section, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{piece.file} holds no tensor at byte {piece.start}") from error
    dtype = getattr(torch, entry.dtype)
    if not isinstance(value, Tensor) or [*value.shape] != piece.sizes or value.dtype != dtype:
        raise CheckpointError(f"{piece.file} holds something else at byte {piece.start} than its index says")
    return value
