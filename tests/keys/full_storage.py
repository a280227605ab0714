"""Storage at `full://` URLs that has no room for the tensors of steps 2 and 3, and says so late.

Brings the tiny model.
"""

import errno
import os
import time
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from tests.trainer import tiny

__all__ = ["tiny"]


class FullStorage(MemoryFileSystem):
    """Memory, full at times."""

    protocol = "full"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("full://"))

    def _open(self, path: str, mode: str = "rb", *rest: Any, **named: Any) -> Any:
        if mode == "wb" and path.endswith(".distcp") and path.split("/")[-2] in ("step-2", "step-3"):
            time.sleep(0.3)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return super()._open(path, mode, *rest, **named)


fsspec.register_implementation("full", FullStorage, clobber=True)
