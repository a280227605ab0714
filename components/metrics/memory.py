"""Peak memory of this rank, with what there is of it: what its allocator reserved, or on a CPU what its process used.

Reserved, not allocated, since reserved is what runs out.
"""

import os
import resource
import sys
from typing import NamedTuple

import torch

GIB = 2**30


class Memory(NamedTuple):
    """A peak since the start of the process."""

    gib: float
    """In GiB."""
    share: float | None
    """Of the device's (the machine's) memory, 0 to 1; None where that is not known."""


def peak_memory(device: torch.device) -> Memory:
    """The peak so far."""
    if device.type == "cpu":
        used, total = _process_peak(), _machine_total()
    else:
        used, total = torch.accelerator.max_memory_reserved(device), torch.accelerator.get_memory_info(device)[1]
    return Memory(used / GIB, used / total if total else None)


def _process_peak() -> int:
    """Bytes. The system counts in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine_total() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
