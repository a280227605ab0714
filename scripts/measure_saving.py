"""What a save costs: how long training stands still for it, in the background and not, and at what speed it is written.

    .venv/bin/python scripts/measure_saving.py [--megabytes 200] [--rounds 7] [--folder /tmp]

Each round saves the same state once in each mode, so that neighbours in time are compared. The first round, which
allocates the host memory, is told apart. Between saves nothing is computed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import get_args

import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.saver import Mode, Saver, SaveResult

TENSORS = 100


def state(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of one size, on the accelerator if there is one."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = megabytes * 1_000_000 // 4 // TENSORS
    return {f"model.{n}": torch.randn(size, device=device) for n in range(TENSORS)}


def save(saver: Saver, step: int, tensors: dict[str, torch.Tensor]) -> SaveResult:
    """One save, waited for. Raises CheckpointError if it fails."""
    saver.save(step, tensors, {}, JobIdentity({}))
    saver.wait()
    (result,) = saver.poll()
    return result


def main() -> None:
    """Save in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    tensors, modes = state(args.megabytes), [mode for mode in get_args(Mode) if mode != "async_with_pinned_mem"]
    if torch.accelerator.is_available():
        modes = [*get_args(Mode)]
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        savers = {
            mode: Saver(Checkpointer(f"{root}/{mode}", keep_latest_k=1, group=None), mode=mode, max_failed_saves=1)
            for mode in modes
        }
        rounds = [{mode: save(savers[mode], step, tensors) for mode in modes} for step in range(args.rounds + 1)]
    for mode in modes:
        first, later = rounds[0][mode], [results[mode] for results in rounds[1:]]
        stall, whole = (statistics.median(getattr(r, key) for r in later) for key in ("stall", "seconds"))
        ratio = statistics.median(r["disabled"].stall / r[mode].stall for r in rounds[1:])
        print(
            f"{mode}: {first.bytes / 1e6:.0f} MB, training waits {stall:.3f} s (first save {first.stall:.3f} s), a"
            f" save takes {whole:.3f} s; disabled waits {ratio:.1f} times as long"
        )


if __name__ == "__main__":
    main()
