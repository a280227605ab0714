"""Which device a rank computes on, and in which precision `auto` is.

MPS is taken only on request: it lacks float64 and collectives, and nothing here is tested on it. A Mac trains on its
CPU, where every feature works.
"""

import os

import torch

from components.runtime.errors import ConfigError
from components.runtime.world import World

VARIABLE = "ESPALIER_DEVICE"


def pick_device(world: World) -> torch.device:
    """The accelerator of this local rank where there is one, else the CPU; made current.

    The environment variable ESPALIER_DEVICE forces a type (`cpu`, `cuda`, …). Raises ConfigError if there is no such
    device, or more local ranks than devices.
    """
    kind = _device_type(os.environ.get(VARIABLE, ""))
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if world.local_rank >= count:
        raise ConfigError(
            f"environment: LOCAL_RANK = {world.local_rank}, but {count} {kind} device(s) are visible: start at most"
            f" {count} processes per machine (NGPU={count}), or set {VARIABLE}=cpu"
        )
    torch.accelerator.set_device_index(world.local_rank)
    return torch.device(kind, world.local_rank)


def _device_type(wanted: str) -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = accelerator.type if accelerator else "cpu"
    if wanted not in ("", "cpu", found):
        allowed = "cpu" if found == "cpu" else f"cpu, {found}"
        raise ConfigError(f"environment: {VARIABLE} = {wanted!r}: no such device here; allowed: {allowed}, or unset it")
    return wanted or ("cpu" if found == "mps" else found)


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: on CUDA devices that compute in it without emulation (8.0 on).

    A CPU says no: without AMX its bfloat16 matmul is several times slower than float32.
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(setting: str, device: torch.device, dry_run: bool = False) -> torch.dtype:
    """What `training.mixed_precision_param` means here: `auto` is bfloat16 where it is fast, else float32.

    A dry run plans for accelerators, so its `auto` is bfloat16 on any machine.
    """
    if setting == "auto":
        return torch.bfloat16 if dry_run or fast_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting]


def mark(device: torch.device) -> torch.Event | None:
    """An event that comes when the device has done all that it was given so far; None for the CPU, which has."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event
