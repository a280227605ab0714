"""A family of plain tensors for tests of Hugging Face files: three of them, and a config.json with one field."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import Rename

JOB = JobIdentity({"model.name": "tiny"}, config="[training]\n")


@dataclass(frozen=True)
class Args:
    """Layers of one square matrix each."""

    layers: int = 3
    width: int = 4

    def parameter_count(self) -> int:
        return self.layers * self.width**2


ADAPTER = Adapter(
    rules=lambda args: (Rename("l.{layer}.w", "their.{layer}.weight"),),
    to_config=lambda args: {"hidden_size": args.width, "num_attention_heads": 1},
    defaults=lambda args: {
        "hidden_size": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": None,
        "head_dim": None,
    },
)


def ours(args: Args = Args(), start: float = 0.0) -> dict[str, Tensor]:
    size = args.width**2
    return {
        f"model.l.{i}.w": torch.arange(start + i * size, start + (i + 1) * size).view(args.width, args.width)
        for i in range(args.layers)
    }


def zeros(args: Args = Args()) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in ours(args).items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(root: Path, tensors: Mapping[str, Tensor]) -> Checkpointer:
    store = Checkpointer(root, keep_latest_k=0, group=None)
    store.save(1, tensors, {}, JOB, "model_only")
    return store


def theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.l", "their").replace(".w", ".weight"): value for name, value in tensors.items()}


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a file of fp32 tensors, one after the other."""
    header, at = dict[str, Any](), 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": [*value.shape], "data_offsets": [at, at + 4 * value.numel()]}
        at += 4 * value.numel()
    return header


def file_bytes(header: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """A file with that header (JSON, or bytes as they are) and those tensors' bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + b"".join(value.numpy().tobytes() for value in tensors.values())


def write_single(folder: Path, header: Any = None) -> Path:
    """A folder with one good file, or with that header."""
    folder.mkdir(exist_ok=True)
    tensors = theirs(ours())
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "model.safetensors").write_bytes(file_bytes(header or header_of(tensors), tensors))
    return folder


def write_sharded(folder: Path) -> Path:
    """The same in two files with an index."""
    folder.mkdir(exist_ok=True)
    first, second = dict([*theirs(ours()).items()][:2]), dict([*theirs(ours()).items()][2:])
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "a.safetensors").write_bytes(file_bytes(header_of(first), first))
    (folder / "b.safetensors").write_bytes(file_bytes(header_of(second), second))
    write_index(folder, {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
