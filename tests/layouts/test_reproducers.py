"""What torch cannot compile, in plain torch: the reason for each refusal of a combination with `compile.enable`. When
one of these fails, the refusal can go."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import run_ranks


def attention_with_a_mask_in_one_process() -> str:
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    with LocalTensorMode(2) as mode:
        q = mode.rank_map(lambda rank: torch.ones(1, 1, 3, 2))
        mask = mode.rank_map(lambda rank: torch.ones(3, 3, dtype=torch.bool).tril())
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)  # eager has no trouble with it
        with pytest.raises(Exception, match=r"Multiple dispatch failed") as error:
            compiled(q, q, q, attn_mask=mask)
    return str(error.value)


def test_compile_under_local_tensor() -> None:
    """`compile.enable` with `comm.mode = "local_tensor"`."""
    (text,) = run_ranks(1, attention_with_a_mask_in_one_process, backend=None)
    assert "torch._ops.aten.where.self" in text
