import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.config.parallelism import Comm
from components.runtime import distributed
from components.runtime.distributed import (
    all_reduce_max,
    all_reduce_sum,
    init_fake,
    init_process_group,
    of_first_rank,
    set_timeout,
)
from components.runtime.errors import ExitCode, UserError
from components.runtime.world import World
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _gloo_timeout(group: dist.ProcessGroup | int | None) -> timedelta:
    assert isinstance(group, dist.ProcessGroup)
    return group._get_backend(CPU).options._timeout


def _alone() -> tuple[int, int, float, float, float]:
    init_process_group(World(0, 0, 1), CPU, Comm(init_timeout_seconds=77), ".")
    second = dist.new_group([0])
    before = _gloo_timeout(dist.group.WORLD).total_seconds()
    set_timeout(12)
    after = [_gloo_timeout(group).total_seconds() for group in (dist.group.WORLD, second)]
    answer = dist.get_rank(), dist.get_world_size(), before, after[0], after[1]
    distributed.destroy()
    distributed.destroy()  # nothing left: no error
    assert not dist.is_initialized()
    return answer


def test_one_rank_and_timeouts_of_all_groups() -> None:
    assert run_ranks(1, _alone, backend=None) == [(0, 1, 77.0, 12.0, 12.0)]


def _reductions() -> tuple[list[float], list[float], list[float]]:
    rank = dist.get_rank()
    values = torch.tensor([1.0 + rank, 5.0 - rank])
    total = all_reduce_sum(values.clone(), dist.group.WORLD).tolist()
    largest = all_reduce_max(values.clone(), dist.group.WORLD).tolist()
    return total, largest, all_reduce_max(all_reduce_sum(values, None), None).tolist()


def test_reductions() -> None:
    assert run_ranks(2, _reductions) == [
        ([3.0, 9.0], [2.0, 5.0], [1.0, 5.0]),
        ([3.0, 9.0], [2.0, 5.0], [2.0, 4.0]),
    ]


def _first() -> list[float]:
    return of_first_rank([0.1 + dist.get_rank() * 2**-56, float("inf")])


def test_the_first_rank_s_numbers() -> None:
    assert run_ranks(2, _first) == [[0.1, float("inf")]] * 2
    assert of_first_rank([0.1]) == [0.1]


def _late_rank() -> float:
    set_timeout(1)
    begin = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.ones(1))
        seconds = time.monotonic() - begin
        dist.destroy_process_group()
        return seconds
    time.sleep(2.5)
    dist.destroy_process_group()
    return 0.0


def test_tightened_timeout_ends_a_wait() -> None:
    assert 0.9 < run_ranks(2, _late_rank, timeout=30)[0] < 2.4


def _fake() -> list[float]:
    init_fake(world_size=64, rank=3)
    assert (dist.get_rank(), dist.get_world_size()) == (3, 64)
    set_timeout(5)
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    return tensor.tolist()


def test_fake_group_has_all_ranks_and_moves_nothing() -> None:
    assert run_ranks(1, _fake, backend=None) == [[1.0, 1.0]]


def _start(rank: int, size: int, port: int, seconds: int) -> tuple[str, int]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with pytest.raises(UserError) as caught:
        init_process_group(World(rank, rank, size), CPU, Comm(init_timeout_seconds=seconds), ".")
    return str(caught.value), caught.value.exit_code


def test_port_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = run_ranks(1, _start, 0, 2, port, 5, backend=None)
    assert answer == [
        (
            f"rank 0: cannot listen on MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}: the port is taken, or not allowed;"
            " set MASTER_PORT to a free port",
            ExitCode.INPUT,
        )
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_master_that_is_not_there() -> None:
    port = _free_port()
    assert run_ranks(1, _start, 1, 2, port, 1, backend=None) == [
        (
            f"rank 1: cannot reach MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port} within 1 s (Connection refused);"
            " start rank 0 there, or set both to where it runs",
            ExitCode.INPUT,
        )
    ]


def test_ranks_that_do_not_come() -> None:
    port = _free_port()
    message = run_ranks(1, _start, 0, 3, port, 1, backend=None)[0][0]
    assert message.startswith(
        f"rank 0: not all of the 3 ranks came to MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port} within 1 s ("
    )
    assert message.endswith("; start them all, or raise comm.init_timeout_seconds")


def _together(port: int) -> float:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_process_group(World.from_environ(os.environ), CPU, Comm(init_timeout_seconds=20), ".")
    return all_reduce_sum(torch.ones(()), dist.group.WORLD).item()


def test_two_ranks_meet_at_the_master() -> None:
    assert run_ranks(2, _together, _free_port(), backend=None) == [2.0, 2.0]


def _leaves(port: int) -> tuple[float, float]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World.from_environ(os.environ)
    init_process_group(world, CPU, Comm(init_timeout_seconds=20), ".")
    time.sleep(0.3 * world.rank)
    still_at_work = time.monotonic()
    distributed.destroy()
    return still_at_work, time.monotonic()


def test_no_rank_leaves_while_another_may_ask_its_store() -> None:
    (_, host_left), (last_at_work, _) = run_ranks(2, _leaves, _free_port(), backend=None)
    assert host_left > last_at_work


def test_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(UserError) as caught:
        init_process_group(World(0, 0, 2), CPU, Comm(), ".")
    assert str(caught.value) == (
        "environment: WORLD_SIZE > 1 with MASTER_ADDR = '', MASTER_PORT = '99999': allowed: the first machine's name"
        " and a port from 1 to 65535; start with torchrun, or set both"
    )


def test_flight_recorder_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **kw: given.update(backend=backend, **kw)
    )
    names = (
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    )
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    init_process_group(World(0, 0, 1), torch.device("cuda", 0), Comm(trace_buf_size=0), tmp_path)
    assert [os.environ.get(name) for name in names] == ["0", None, None, None]
    monkeypatch.delenv(names[0])
    init_process_group(World(0, 0, 1), torch.device("cuda", 0), Comm(trace_buf_size=50), tmp_path)
    prefix = str(tmp_path / "comm_traces" / "rank_")
    assert [os.environ[name] for name in names] == ["50", "1", prefix, prefix]
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert (tmp_path / "comm_traces").is_dir()
