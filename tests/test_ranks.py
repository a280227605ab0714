"""The rank harness itself."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum(x: int) -> tuple[int, float, int]:
    t = torch.tensor([float(dist.get_rank() + x)])
    dist.all_reduce(t)
    return int(os.environ["RANK"]), t.item(), torch.get_num_threads()


def _raise_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def _sleep() -> None:
    time.sleep(60)


def _no_group() -> bool:
    return dist.is_initialized()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_every_rank_answers(n: int) -> None:
    assert run_ranks(n, _sum, 1) == [(r, n * (n + 1) / 2, 1) for r in range(n)]


def test_the_failing_rank_is_reported() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*ValueError: rank one is unhappy"):
        run_ranks(2, _raise_on_one)


def test_timeout_kills_the_ranks() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"killed after 0\.5 s"):
        run_ranks(2, _sleep, timeout=0.5)
    assert time.monotonic() - start < 10


def test_without_a_process_group() -> None:
    assert run_ranks(1, _no_group, backend=None) == [False]
