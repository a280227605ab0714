"""Garbage collection at the same step on all ranks.

Python collects when a rank happens to have allocated enough, and all others then wait in the next collective. So the
automatic collector is switched off, and all ranks collect together. What exists at start-up (torch's modules, mostly)
is frozen out: it is never garbage, and looking at it would take most of the time. Collecting only the younger
generations was rejected: what survives one collection would never be freed.
"""

import gc
import time

from components.runtime.logging import logger


class GarbageCollector:
    """Collects every `freq` steps; with `debug` every step, and logs what was found. One per process at a time."""

    def __init__(self, freq: int, debug: bool = False) -> None:
        self._freq, self._debug = freq, debug
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        gc.disable()

    def run(self, step: int) -> None:
        """Collect if `step` is due. Call it after every step, on all ranks."""
        if self._debug or step % self._freq == 0:
            begin = time.perf_counter()
            found = gc.collect()
            if self._debug:
                logger.info("garbage at step %d: %d objects, %.1f ms", step, found, 1e3 * (time.perf_counter() - begin))

    def close(self) -> None:
        """Give the automatic collector back."""
        gc.unfreeze()
        gc.enable()
