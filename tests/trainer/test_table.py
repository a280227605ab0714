"""The table of a checkpoint: where every row of the global batch goes on, in its order, whatever the layout."""

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from components.checkpoint.ranks import Ranks
from tests.ranks import run_ranks
from trainer.persistence import Parts

EXPECTED = [[r, 10 * r, 100 * r] for r in range(8)]


def parts(rank: int, degree: int) -> Parts:
    return Parts([], cast(Any, SimpleNamespace()), cast(Any, SimpleNamespace()), rank, degree)


def table(copies: int) -> list[list[int]]:
    """Of ranks of which `copies` in a row read the same rows."""
    rank, degree = dist.get_rank() // copies, dist.get_world_size() // copies
    return parts(rank, degree).table(torch.tensor(EXPECTED[rank::degree]), Ranks(dist.group.WORLD))


def test_the_table_is_in_global_order() -> None:
    assert run_ranks(2, table, 1) == [EXPECTED] * 2
    assert run_ranks(4, table, 2) == [EXPECTED] * 4
    assert parts(0, 1).table(torch.tensor(EXPECTED), Ranks(None)) == EXPECTED
    assert parts(0, 1).table(None, Ranks(None)) == []
