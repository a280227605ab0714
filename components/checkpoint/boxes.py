"""DCP's planners, told which box of each tensor this rank holds.

Their own arithmetic goes wrong where tensor parallelism and FSDP2 have cut one dimension in turn, unevenly: of 7 rows
over 2 × 3 ranks it gives the last one to a rank that has none (torch 2.13), and the checkpoint is broken. Ours is that
of `components.mesh.counter`, which the initialization goes by as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from components.mesh.counter import local_dims
from components.runtime.errors import CheckpointError


class SaveBoxes(DefaultSavePlanner):
    """Plans to write the box that this rank holds of each tensor."""

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor; what several ranks hold is deduplicated later, by its offsets."""
        self.plan = SavePlan([_write_item(name, tensor) for name, tensor in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The box itself."""
        return _local(self.state_dict[index.fqn])


class LoadBoxes(DefaultLoadPlanner):
    """Plans to read the box that this rank holds of each tensor, from whatever boxes were saved."""

    def create_local_plan(self) -> LoadPlan:
        """One item for each saved box that meets this rank's."""
        items = []
        for name, tensor in self.state_dict.items():
            entry: Any = self.metadata.state_dict_metadata[name] if self.metadata else None
            items += create_read_items_for_chunk_list(name, entry, [_box(name, tensor)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box itself, which is written into."""
        return _local(self.state_dict[index.fqn])


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _box(name: str, tensor: Tensor) -> ChunkStorageMetadata:
    """Where this rank's piece begins and how long it is; an empty one begins at the end, where no other does.

    Raises CheckpointError if it is no box: FSDP2 and tensor parallelism cut nothing else.
    """
    if not isinstance(tensor, DTensor):
        return ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.size())
    dims = local_dims(tensor)
    for held in dims:
        if len(held) and int(held[-1]) - int(held[0]) != len(held) - 1:
            raise CheckpointError(f"{name}: a rank's part of it is not one piece: {tensor.placements}")
    offsets = [int(held[0]) if len(held) else size for held, size in zip(dims, tensor.shape, strict=True)]
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size([len(held) for held in dims]))


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    box = _box(name, tensor)
    data = TensorWriteData(box, TensorProperties.create_from_tensor(_local(tensor)), tensor.size())
    return WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=data)
