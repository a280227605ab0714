"""The whole of a DTensor, for comparison.

`DTensor.full_tensor` puts uneven shards that tensor parallelism and FSDP2 have cut in turn together in another order
than that in which they were cut (torch 2.13: 7 rows over 2 × 3 ranks, say).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.mesh.counter import local_dims


def whole(value: Tensor) -> Tensor:
    """The same tensor on every rank, put together from what each rank holds. Collective over all ranks."""
    if not isinstance(value, DTensor):
        return value.detach().clone()
    pieces: list[tuple[list[Tensor], Tensor]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(pieces, (local_dims(value.detach()), value.to_local().detach()))
    out = torch.full(value.shape, torch.nan, dtype=value.dtype)
    for dims, piece in pieces:
        if piece.numel():
            out[torch.meshgrid(*dims, indexing="ij")] = piece
    return out


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, whole, by name."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
