"""Do two models compute the same? Hidden states after every block and logits of a fixed batch, side by side.

Equal names and shapes do not make a conversion right: rows in another order pass every check but this one. Both models
are held whole, in fp32, on the CPU. The side that is not ours is transformers, or for TorchTitan's checkpoints, of
which there is no other reader, our model with the weights read directly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.state import ALL_BUT_MODEL, model_tensors
from components.checkpoint.storage import open_folder
from components.checkpoint.titan import open_titan
from components.runtime.errors import ConfigError
from trainer.build import build_on_meta, materialize, zero_buffers
from trainer.convert import Target, as_titan

TOLERANCE = 1e-4
"""Largest difference that passes, relative to the largest value beside it."""
_ROWS, _TOKENS, _SEED = 2, 32, 5


@dataclass(frozen=True)
class Trace:
    """What a model computes of the batch."""

    hidden: Sequence[Tensor]
    """Embeddings, the states after each block but the last, and those after the final norm. # (rows, seq, dim) each"""
    logits: Tensor
    """# (rows, seq, vocab)"""


@dataclass(frozen=True)
class Difference:
    """How far two models are from each other at one place."""

    place: str
    """Where."""
    absolute: float
    """Largest difference of two elements."""
    relative: float
    """The same, divided by the largest absolute value of the reference."""


def differences(found: Trace, reference: Trace) -> list[Difference]:
    """One for each place, in the order of the model. Raises ConfigError if they are not of the same shape."""
    last = len(reference.hidden) - 1
    names = ["embeddings", *(f"block {layer}" for layer in range(last - 1)), f"block {last - 1} and norm", "logits"]
    pairs = zip([*found.hidden, found.logits], [*reference.hidden, reference.logits], strict=False)
    if len(found.hidden) != len(reference.hidden) or found.logits.shape != reference.logits.shape:
        raise ConfigError("--verify: the two models have not as many blocks or entries")
    return [_difference(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _difference(place: str, found: Tensor, reference: Tensor) -> Difference:
    gap = (found.double() - reference.double()).abs().max().item()
    largest = reference.double().abs().max().item()
    relative = gap / largest if largest else (0.0 if gap == 0 else math.inf)
    return Difference(place, gap, relative)


def table(rows: Sequence[Difference], tolerance: float) -> str:
    """The differences as text; those that are too large, or no numbers, are marked."""
    width = max(len(row.place) for row in rows)
    lines = [f"{'':{width}}  largest difference  relative"]
    for row in rows:
        mark = "" if passes(row, tolerance) else f"  above {tolerance:g}"
        lines.append(f"{row.place:{width}}  {row.absolute:18.3e}  {row.relative:8.1e}{mark}")
    return "\n".join(lines)


def passes(row: Difference, tolerance: float) -> bool:
    """Whether it is small enough; what is not a number is not."""
    return row.relative <= tolerance


def batch(target: Target) -> Tensor:
    """The tokens that both models see, the same in each run. # (rows, seq) int64"""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, target.args.vocab_size, (_ROWS, _TOKENS), generator=generator)


def of_checkpoint(path: str, target: Target, dtype: str) -> Trace:
    """Our model with the weights of a checkpoint of ours, rounded to a type ("source": as they are)."""
    model = _empty(target)
    tensors = model_tensors([model])
    Checkpointer(path, keep_latest_k=0, group=None).load(path, tensors, job=None, exclude=ALL_BUT_MODEL, cast=True)
    return _ours(model, target, dtype)


def of_titan(path: str, target: Target, dtype: str) -> Trace:
    """Our model with the weights of a checkpoint of TorchTitan's."""
    source = open_titan(open_folder(path))
    target, names = as_titan(source, target)
    model = _empty(target)
    tensors = model_tensors([model])
    with torch.no_grad():
        for name, (_, _, make) in source.sources(names, optimizer=False).items():
            tensors[name].copy_(make())
    return _ours(model, target, dtype)


def of_transformers(path: str, target: Target, dtype: str) -> Trace:
    """transformers' model of a folder of theirs. Raises ConfigError where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "--verify compares with transformers, which is not installed: pip install transformers"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", local_files_only=True)
    model = _rounded(model.float(), dtype).eval()
    with torch.no_grad():
        out = model(batch(target), output_hidden_states=True, use_cache=False)
    return Trace(out.hidden_states, out.logits)


def _empty(target: Target) -> nn.Module:
    model = build_on_meta(target.spec, target.args, target.job)
    materialize(model, "cpu")
    zero_buffers(model, "cpu")
    return model


def _rounded(model: nn.Module, dtype: str) -> nn.Module:
    """The model with its parameters as they would come out of a file of that type."""
    if dtype != "source":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def _ours(model: Any, target: Target, dtype: str) -> Trace:
    """Our model's trace, by hooks on its blocks."""
    _rounded(model, dtype)
    tokens = batch(target)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    hidden: list[Tensor] = []
    blocks = [*model.layers.values()]
    handles = [block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) for block in blocks]
    try:
        with torch.no_grad():
            last = model(tokens, positions=positions)
            logits = model.output(last)
    finally:
        for handle in handles:
            handle.remove()
    return Trace([*hidden, last], logits)
