"""DCP's planners, told which box of each tensor this rank holds.

Their own arithmetic goes wrong where tensor parallelism and FSDP2 have cut one dimension in turn, unevenly: of 7 rows
over 2 × 3 ranks it gives the last one to a rank that has none (torch 2.13), and the checkpoint is broken. Ours is that
of `components.mesh.counter`, which the initialization goes by as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from components.mesh.counter import local_dims
from components.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Box:
    """What this rank holds of a tensor: one piece of it, perhaps empty."""

    data: Tensor
    """The piece, a plain tensor."""
    offsets: tuple[int, ...]
    """Its first index in each dimension; an empty piece begins at the end, where no other does."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    source: Callable[[], Tensor] | None = None
    """Makes the data when it is their turn to be written; `data` is then their outline on the meta device."""


def box_of(name: str, tensor: Tensor) -> Box:
    """This rank's box of a tensor, over the tensor's own memory.

    Raises CheckpointError if it is no box: FSDP2 and tensor parallelism cut nothing else.
    """
    if not isinstance(tensor, DTensor):
        return Box(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))
    dims = local_dims(tensor)
    for held in dims:
        if len(held) and int(held[-1]) - int(held[0]) != len(held) - 1:
            raise CheckpointError(f"{name}: a rank's part of it is not one piece: {tensor.placements}")
    offsets = tuple(int(held[0]) if len(held) else size for held, size in zip(dims, tensor.shape, strict=True))
    return Box(tensor.to_local().detach(), offsets, tuple(tensor.shape))


def boxes_of(tensors: Mapping[str, Tensor]) -> dict[str, Box]:
    """This rank's box of each tensor. Raises CheckpointError."""
    return {name: box_of(name, tensor) for name, tensor in tensors.items()}


def as_boxes(tensors: Mapping[str, Tensor | Box], dtype: torch.dtype | None = None) -> dict[str, Box]:
    """This rank's box of each; one that is a box already stays as it is. Raises CheckpointError.

    `dtype`: type of floating point values, a copy of this rank's piece where it changes; None: as it is.
    """
    boxes = {n: value if isinstance(value, Box) else box_of(n, value) for n, value in tensors.items()}
    stored = {name: replace(box, data=box.data.to(stored_type(box.data, dtype))) for name, box in boxes.items()}
    for name, box in stored.items():
        require_held(name, boxes[name].data, box.data)
    return stored


def require_held(name: str, data: Tensor, copy: Tensor) -> None:
    """Raise CheckpointError if the copy's type has made an infinity of a finite value."""
    if copy.dtype == data.dtype or not copy.numel() or torch.stack(copy.aminmax()).isfinite().all():
        return  # found without another tensor of that size
    if int(copy.isinf().sum()) != int(data.isinf().sum()):
        raise CheckpointError(
            f"{name}: {str(copy.dtype).removeprefix('torch.')} cannot hold its largest value,"
            f" {float(data.abs()[data.isfinite()].max()):g}; take another checkpoint.export_dtype"
        )


def stored_type(data: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that values are saved in: floating point ones as `dtype`, unless it is None."""
    return dtype if dtype is not None and data.is_floating_point() else data.dtype


class SaveBoxes(DefaultSavePlanner):
    """Plans to write boxes, by the names of their tensors."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor; what several ranks hold is deduplicated later, by its offsets."""
        self.plan = SavePlan([_write_item(name, box) for name, box in self._boxes.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The box's data. Raises CheckpointError if its source makes something else than it has announced."""
        box = self._boxes[index.fqn]
        if box.source is None:
            return box.data
        made = box.source()
        if (made.shape, made.dtype) != (box.data.shape, box.data.dtype):
            raise CheckpointError(f"{index.fqn}: {made.dtype} {[*made.shape]} instead of {box.data.dtype}")
        return made


class LoadBoxes(DefaultLoadPlanner):
    """Plans to read boxes from whatever boxes were saved."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._written = dict.fromkeys(boxes, 0)

    def create_local_plan(self) -> LoadPlan:
        """One item for each saved box that meets this rank's."""
        items = []
        for name, box in self._boxes.items():
            entry: Any = self.metadata.state_dict_metadata[name] if self.metadata else None
            items += create_read_items_for_chunk_list(name, entry, [_chunk(box)])
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Never: the inherited method would run a pickle's code. Raises CheckpointError."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box's data, which are written into."""
        return self._boxes[index.fqn].data

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count what has been read."""
        self._written[read_item.dest_index.fqn] += tensor.numel()

    def unfilled(self) -> list[str]:
        """Tensors of whose boxes not every element has been read, sorted."""
        return sorted(name for name, box in self._boxes.items() if self._written[name] != box.data.numel())


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), box.data.size())


def _write_item(name: str, box: Box) -> WriteItem:
    data = TensorWriteData(_chunk(box), TensorProperties.create_from_tensor(box.data), torch.Size(box.shape))
    return WriteItem(MetadataIndex(name, torch.Size(box.offsets)), WriteItemType.SHARD, tensor_data=data)
