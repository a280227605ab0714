"""Process groups: how they start, time out and end, and the two reductions that rooms share.

One rank has a process group too (over a HashStore, no socket), so that meshes and collectives need no second path. On
CUDA every group can also carry CPU tensors over gloo: offloaded gradients and Python objects travel without a copy to
the device. The rank that hosts the store is the only one that listens; the others look for it with a plain socket
first, since torch's own client prints a C++ stack trace for each second that it waits.
"""

import os
import secrets
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from components.config.parallelism import Comm
from components.runtime.errors import UserError
from components.runtime.witness import Witness, running
from components.runtime.world import World

RETRY_SECONDS = 0.2
JOIN_SECONDS = 0.005
HOST_GROUPS = ("checkpoint", "interruption")
"""Groups of all ranks besides the default one; each carries the communication of one thing at a time."""


def init_process_group(world: World, device: torch.device, comm: Comm, dump_folder: Path | str) -> None:
    """Start the default group: gloo on a CPU, gloo and NCCL on CUDA. One rank needs neither variables nor a port.

    Raises UserError if MASTER_ADDR:MASTER_PORT cannot be listened on or reached within `comm.init_timeout_seconds`.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    traces = Path(dump_folder) / comm.save_traces_folder / comm.save_traces_file_prefix
    _set_flight_recorder(comm, str(traces), device)
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    address, port = _master()
    hosts_store = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts_store:
        _wait_for_master(world, address, port, comm.init_timeout_seconds)
    try:
        store, *_ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _of_this_attempt(store, world, comm.init_timeout_seconds)
        groups = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=groups, rank=world.rank, world_size=world.size, timeout=timeout)
    except dist.DistNetworkError as error:
        raise UserError(_cannot_listen(world, address, port, error)) from error
    except dist.DistStoreError as error:
        raise UserError(
            f"rank {world.rank}: not all of the {world.size} ranks came to MASTER_ADDR:MASTER_PORT = {address}:{port}"
            f" within {comm.init_timeout_seconds} s ({_first_line(error)}); start them all, or raise"
            " comm.init_timeout_seconds"
        ) from error
    Witness(world.rank, store, Path(f"{traces}{world.rank}")).start()


def _of_this_attempt(store: dist.Store, world: World, seconds: float) -> dist.Store:
    """The part of torchrun's store that belongs to this attempt alone. Raises DistStoreError if not all ranks come.

    The store outlives the ranks: those that are started again find the addresses of the dead. torchrun's own count of
    restarts is one of each machine, and they count differently. So rank 0 names the attempt: to whoever asks it by a
    name that nobody had before, until all have said that they know it.
    """
    own = secrets.token_hex(8)
    if world.rank:
        store.set(f"join/{world.rank}", own)
        name = store.get(f"seat/{own}").decode()
        store.set(f"seated/{name}/{world.rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, world.size)), time.monotonic() + seconds
    while missing := {rank for rank in missing if not store.check([f"seated/{own}/{rank}"])}:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank {min(missing)} has not come")
        for rank in missing:
            if store.check([f"join/{rank}"]):
                store.set(f"seat/{store.get(f'join/{rank}').decode()}", own)
        time.sleep(JOIN_SECONDS)
    return dist.PrefixStore(own, store)


def init_fake(world_size: int, rank: int = 0) -> None:
    """Start a group of `world_size` ranks of which only this one exists, for the dry run: collectives return at once.

    The back end registers itself when its module is imported; it stands in torch's test package, and nowhere else.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def set_timeout(seconds: float) -> None:
    """Give every existing group this timeout for its further collectives, once start-up's slow first step is over.

    Groups of `new_host_group` keep theirs. Waits for the device and for all ranks first, so that no collective of the
    first step is still on its way. Torch has no public way to change a timeout or to list the groups. Works for gloo
    and NCCL; a fake group has no timeout.
    """
    if dist.get_backend() == dist.Backend.FAKE:
        return
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    dist.all_reduce(torch.zeros(1))  # over gloo in every set-up: a barrier that needs no device
    for group in list(distributed_c10d._world.pg_map):
        if dist.get_backend(group) != dist.Backend.FAKE and group.group_desc not in HOST_GROUPS:  # FAKE: of size 1
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def new_host_group(name: str, seconds: float) -> ProcessGroup | None:
    """A further group of all ranks, over gloo, with a timeout of its own that `set_timeout` leaves as it is.

    For what goes on beside the training's own communication, in another thread or for longer: `name` is one of
    `HOST_GROUPS`. None without a process group, which is a group of one. Collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == dist.Backend.FAKE:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds), group_desc=name)
    return group if isinstance(group, ProcessGroup) else None  # a rank outside of the group gets a number


def destroy() -> None:
    """End all process groups, if there are any. Collective.

    The store goes with the rank that hosts it, and others may still ask it; so all come here before one leaves.
    """
    if dist.is_initialized() and dist.get_backend() != dist.Backend.FAKE:
        dist.all_reduce(torch.zeros(1))  # over gloo in every set-up
    if witness := running():
        witness.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add up `tensor` over a group, in place; None is a group of one."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The elementwise maximum over a group, in place; None is a group of one."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return tensor


def of_first_rank(values: Sequence[float]) -> list[float]:
    """Rank 0's numbers, on all ranks; these, where there is one. Over gloo in every set-up. Collective."""
    agreed = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != dist.Backend.FAKE:
        dist.broadcast(agreed, src=0)
    return agreed.tolist()


def _set_flight_recorder(comm: Comm, prefix: str, device: torch.device) -> None:
    """Torch's flight recorder, by the variables it reads; what the user has set stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
    if comm.trace_buf_size == 0 or device.type != "cuda":
        return
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix)  # its name before TORCH_FR_*


def _master() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if address and port.isascii() and port.isdigit() and 0 < int(port) < 2**16:
        return address, int(port)
    raise UserError(
        f"environment: WORLD_SIZE > 1 with MASTER_ADDR = {address!r}, MASTER_PORT = {port!r}: allowed: the first"
        " machine's name and a port from 1 to 65535; start with torchrun, or set both"
    )


def _wait_for_master(world: World, address: str, port: int, seconds: float) -> None:
    """Return once something listens there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(RETRY_SECONDS, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {world.rank}: cannot reach MASTER_ADDR:MASTER_PORT = {address}:{port} within"
                    f" {seconds:g} s ({error.strerror or error}); start rank 0 there, or set both to where it runs"
                ) from error
        time.sleep(RETRY_SECONDS)


def _cannot_listen(world: World, address: str, port: int, error: Exception) -> str:
    if world.rank == 0:
        return (
            f"rank 0: cannot listen on MASTER_ADDR:MASTER_PORT = {address}:{port}: the port is taken, or not allowed;"
            " set MASTER_PORT to a free port"
        )
    return f"rank {world.rank}: lost MASTER_ADDR:MASTER_PORT = {address}:{port} at start-up ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
