"""How much memory export and import of Hugging Face weights take beside the model, and how long.

    .venv/bin/python scripts/measure_hf.py outputs/measured [megabytes]

Saves models of about that many megabytes (400 by default) of random fp32 weights below the folder: one of dense
blocks, and one of experts whose matrices are fused and transposed in Hugging Face's files. Exports each in bfloat16,
and imports it, in fresh processes; then removes everything. Memory is the most that the process has held since just
before, beyond what it held then (`VmHWM` of /proc/self/status): Linux only. Import writes into tensors that are there
already.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hf_export import export_hf
from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.checkpoint.storage import open_storage
from models.train_spec import families, get_args

MB = 1e6
SHARD_BYTES = 50_000_000
"""Largest file of an export; 5 GB would be all of such a model."""


def shapes_of(name: str, megabytes: float) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Arguments and tensors of a model of that family, with so many blocks that it has the size."""
    spec = families.lookup(name).load()
    flavor: Any = get_args(name, "debugmodel")
    args = replace(flavor, dim=1024, vocab_size=8192)
    if args.experts is not None:
        args = replace(args, experts=replace(args.experts, count=16, hidden=512))
    else:
        args = replace(args, ffn_hidden=4096)
    one, two = (replace(args, n_layers=layers).parameter_count() for layers in (2, 4))
    layers = 2 * max(1, round((megabytes * MB / 4 - one) / (two - one)) + 1)
    args = replace(args, n_layers=layers)
    with torch.device("meta"):
        tensors = model_tensors([spec.model_cls(args)])
    return args, {key: tuple(value.shape) for key, value in tensors.items()}


def memory(key: str) -> float:
    """A line of this process's status, in MB."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024 / MB


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """MB at the peak of a call, beyond those before it, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, begun = memory("VmRSS"), time.perf_counter()
    call()
    return memory("VmHWM") - before, time.perf_counter() - begun


def save(root: str, name: str, megabytes: float) -> None:
    """A checkpoint of such a model."""
    _, shapes = shapes_of(name, megabytes)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    Checkpointer(root, keep_latest_k=0, group=None).save_model(1, tensors, JobIdentity({}), torch.float32)


def export(root: str, name: str, megabytes: float) -> tuple[float, float]:
    """Peak and seconds."""
    args, _ = shapes_of(name, megabytes)
    manifest = Checkpointer(root, keep_latest_k=0, group=None).read_manifest(1)
    source, target = open_storage(root).folder("step-1"), open_storage(f"{root}/export")
    adapter: Any = families.lookup(name).load().state_dict_adapter
    how: dict[str, Any] = {"dtype": "bfloat16", "ranks": Ranks(None), "shard_bytes": SHARD_BYTES}
    return measured(lambda: export_hf(source, manifest, target, "step-1", adapter, args, **how))


def load(root: str, name: str, megabytes: float) -> tuple[float, float]:
    """Peak and seconds."""
    args, shapes = shapes_of(name, megabytes)
    tensors: dict[str, Tensor] = {key: torch.ones(shape) for key, shape in shapes.items()}
    adapter: Any = families.lookup(name).load().state_dict_adapter
    return measured(lambda: load_hf(f"{root}/export/step-1", tensors, adapter, args, Ranks(None)))


def largest(name: str, megabytes: float) -> tuple[float, float, float]:
    """MB of the model, and of its largest tensor as we have it (fp32) and as Hugging Face has it (bfloat16)."""
    args, shapes = shapes_of(name, megabytes)
    adapter: Any = families.lookup(name).load().state_dict_adapter
    theirs = adapter.table(args, {key.removeprefix("model."): shape for key, shape in shapes.items()}).theirs
    sizes = [math.prod(shape) for shape in shapes.values()]
    return 4 * sum(sizes) / MB, 4 * max(sizes) / MB, 2 * max(math.prod(shape) for shape in theirs.values()) / MB


def main(root: str, megabytes: str = "400") -> None:
    """Measure both models and print."""
    for name in ("llama3", "gpt_oss"):
        folder, size = f"{root}/{name}", float(megabytes)
        whole, ours, theirs = apart(largest, name, size)
        apart(save, folder, name, size)
        out, out_seconds = apart(export, folder, name, size)
        back, back_seconds = apart(load, folder, name, size)
        print(f"{name}: {whole:.0f} MB; largest tensor {ours:.1f} MB in fp32, exported {theirs:.1f} MB")
        print(f"  export: {out:.1f} MB at the peak, {out_seconds:.1f} s")
        print(f"  import: {back:.1f} MB at the peak beside the model, {back_seconds:.1f} s", flush=True)
        shutil.rmtree(folder)


def apart(call: Callable[..., Any], *given: Any) -> Any:
    """Call in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(call, given)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
