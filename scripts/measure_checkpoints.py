"""What hashing costs when a checkpoint is saved and verified: bytes per second, and its share of the save.

    .venv/bin/python scripts/measure_checkpoints.py outputs/measured [GB] [rounds]

Saves tensors of that many gigabytes (1 by default) below the folder, from an accelerator if there is one, verifies them
with one thread and with four, and removes them. Hashing within the save is timed by a clock around each call; both are
also given in seconds of the processor, since other jobs on the machine lengthen the others. Verified right after it was
saved: what is read comes from the page cache. The best of the rounds counts.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hashing import ChunkHasher, hash_chunks
from components.checkpoint.storage import step_name

PIECE = 1 << 24  # values of a tensor: 64 MiB


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    begin, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - used


class Meter(ChunkHasher):
    """Hashes, and knows how long all of its kind have taken."""

    seconds = used = 0.0

    def update(self, data: memoryview) -> None:
        """The next bytes, timed."""
        seconds, used = timed(lambda: super(Meter, self).update(data))
        Meter.seconds += seconds
        Meter.used += used


def save(run: Checkpointer, step: int, gigabytes: float) -> tuple[float, float, float]:
    """Seconds of a save, those of hashing in it, and the latter's of the processor."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    count = max(1, round(gigabytes * 1e9 / 4 / PIECE))
    tensors = {f"model.{n}": torch.randn(PIECE, device=device) for n in range(count)}
    Meter.seconds = Meter.used = 0.0
    seconds, _ = timed(lambda: run.save(step, tensors, {}, JobIdentity({})))
    return seconds, Meter.seconds, Meter.used


def verify(run: Checkpointer, step: int, threads: int) -> tuple[float, float]:
    """Seconds of hashing all of a checkpoint's files, on the clock and of the processor."""
    folder, manifest = run.storage.folder(step_name(step)), run.read_manifest(step)
    chunks = [(partial(folder.open, file.name), n) for file in manifest.files for n in range(len(file.hashes))]
    return timed(lambda: hash_chunks(chunks, manifest.chunk_bytes, threads))


def main(root: str, gigabytes: str = "1", rounds: str = "3") -> None:
    """Save, verify, print, remove."""
    import components.checkpoint.storage as storage

    storage.ChunkHasher = Meter  # pyrefly: ignore[bad-assignment]  # the same, with a clock
    run = Checkpointer(Path(root), keep_latest_k=0, group=None)
    run.prepare()
    saves, verifies = [], {1: [], 4: []}
    for step in range(1, int(rounds) + 1):
        saves.append(save(run, step, float(gigabytes)))
        for threads, found in verifies.items():
            found.append(verify(run, step, threads))
        size = sum(file.size for file in run.read_manifest(step).files) / 1e9
        run.storage.delete(step_name(step))
    seconds, hashing, used = min(saves)
    print(f"{size:.2f} GB, best of {rounds}; seconds on the clock (of the processor)")
    print(f"save: {seconds:.2f}, {size / seconds:.2f} GB/s")
    print(f"  hashing in it: {hashing:.3f} ({used:.3f}), {size / used:.1f} GB/s, {hashing / seconds:.1%} of the save")
    for threads, found in verifies.items():
        seconds, used = min(found)
        print(f"verify, {threads} threads: {seconds:.3f} ({used:.3f}), {size / seconds:.1f} GB/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
