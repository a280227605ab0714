"""How two checkpoints differ: tensors by how far they are from each other, everything else by value.

One tensor of each is held at a time, whole, whatever layouts they were saved on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.contents import read_files
from components.checkpoint.fingerprint import compare_fingerprints
from components.checkpoint.inspect import require_checkpoint
from components.checkpoint.manifest import Manifest
from components.checkpoint.storage import Folder
from components.checkpoint.tensors import Index, TensorEntry, read_tensors

_CHUNK = 1 << 22
_SHOWN = 60


@dataclass(frozen=True)
class Side:
    """One of the two."""

    folder: Folder
    manifest: Manifest
    index: Index
    state: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        entry = self.index[name]
        value = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        read_tensors(self.folder, self.index, {name: value})
        return value


def open_side(folder: Folder) -> Side:
    """A checkpoint to compare, every byte of it verified. Raises CheckpointError, OSError."""
    manifest = require_checkpoint(folder)
    index, state = read_files(folder, manifest)
    return Side(folder, manifest, index, state)


class Comparison:
    """Of two checkpoints, the tensors that differ being counted as they are told."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self.both = sorted({*a.index} & {*b.index})
        self.differ = 0

    def lines(self) -> Iterator[str]:
        """A line for each difference. Raises CheckpointError, OSError."""
        a, b = self.a, self.b
        for line in compare_fingerprints(a.manifest.fingerprint, b.manifest.fingerprint):
            yield f"job: {line.replace(' saved, ', ', ').removesuffix(' now')}"
        mine, theirs = _flat("state", a.state), _flat("state", b.state)
        for key in sorted({*mine, *theirs}):
            if _shown(mine, key) != _shown(theirs, key):
                yield f"{key}: {_short(_shown(mine, key))}, {_short(_shown(theirs, key))}"
        for which, one, other in (("first", a, b), ("second", b, a)):
            yield from (f"{name}: only in the {which}" for name in sorted({*one.index} - {*other.index}))
        for name in self.both:
            if line := _tensor_difference(name, a, b):
                self.differ += 1
                yield f"{name}: {line}"

    def summary(self) -> str:
        """How many tensors there were, once all lines are told."""
        only = len({*self.a.index} ^ {*self.b.index})
        return f"tensors: {len(self.both) - self.differ} equal, {self.differ} differ, {only} in one of them only"


def _tensor_difference(name: str, a: Side, b: Side) -> str:
    """How a tensor differs; empty if it is the same to the last bit."""
    mine, theirs = a.index[name], b.index[name]
    if mine.shape != theirs.shape:
        return f"{_form(mine)}, {_form(theirs)}"
    x, y = a.tensor(name), b.tensor(name)
    if x.dtype == y.dtype and torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)):
        return ""
    types = f", {mine.dtype} and {theirs.dtype}" if x.dtype != y.dtype else ""
    if name.startswith("rng."):
        return "differs"
    largest, relative = distance(x, y)
    return f"max {largest:.3g}, relative {relative:.3g}{types}"


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the norm of the difference by that of `x`; nan where one is not finite."""
    largest = difference = norm = torch.zeros((), dtype=torch.float64)
    if not x.numel():
        return 0.0, 0.0
    for mine, theirs in zip(x.flatten().split(_CHUNK), y.flatten().split(_CHUNK), strict=True):
        gap = (mine.double() - theirs.double()).abs()
        largest = torch.maximum(largest, gap.max())  # keeps what is not a number
        difference, norm = difference + gap.square().sum(), norm + mine.double().square().sum()
    return float(largest), float((difference / norm).sqrt())


def _form(entry: TensorEntry) -> str:
    return f"{entry.dtype} {entry.shape}"


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for k, inner in value.items() for key, leaf in _flat(f"{name}.{k}", inner).items()}
    return {name: value}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
