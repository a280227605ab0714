"""Block masks on the device: the kernels against attention by a bool mask, in both precisions, and what they cost."""

import pytest
import torch
from torch import Tensor

from components.layers import block_mask
from components.layers.attention import AttentionMask, InnerAttention
from components.layers.block_mask import Blocks
from components.layers.shapes import Reach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [700, 1, 300, 47, 1000]
SEQ = sum(LENGTHS)


def packed(rows: int) -> tuple[Tensor, Tensor]:
    """Positions and document numbers. # (rows, SEQ)"""
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return positions.expand(rows, -1).cuda(), ids.expand(rows, -1).cuda()


def test_the_trial_passes() -> None:
    assert block_mask._trial(torch.device("cuda")) == ""


@pytest.mark.parametrize("heads", [(8, 2, 128, 128), (6, 6, 192, 128), (4, 4, 16, 16), (8, 1, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reach", [Reach(), Reach(window=200), Reach(chunk=256)], ids=str)
def test_kernels_agree_with_a_bool_mask(reach: Reach, dtype: torch.dtype, heads: tuple[int, int, int, int]) -> None:
    n, kv, width, v_width = heads
    torch.manual_seed(0)
    shapes = [(2, n, SEQ, width), (2, kv, SEQ, width), (2, kv, SEQ, v_width)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    masks = [AttentionMask(reach, in_blocks)(*packed(2)) for in_blocks in (True, False)]
    assert [type(mask) for mask in masks] == [Blocks, Tensor]
    outs = [InnerAttention()(*inputs, mask) for mask in masks]
    grad = torch.randn_like(outs[0])
    found, want = ([out, *torch.autograd.grad(out, inputs, grad)] for out in outs)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for got, wanted in zip(found, want, strict=True):
        assert ((got - wanted).float().norm() / wanted.float().norm()).item() < tolerance


def test_a_mask_of_a_long_row_is_small() -> None:
    seq = 32768
    positions, ids = torch.arange(seq, device="cuda")[None], torch.zeros(1, seq, dtype=torch.int64, device="cuda")
    mask = AttentionMask(Reach(), True)(positions, ids)  # the first may try the kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = AttentionMask(Reach(), True)(positions, ids)
    assert isinstance(mask, Blocks)
    assert torch.cuda.max_memory_allocated() - before < seq**2 // 16
