"""What transformers would give parameters and buffers at first, found out without drawing a number.

Their models initialize themselves module by module, in sequence. Here the calls are recorded on the meta device: what
each parameter would be filled with becomes an entry of our table, by name, so that values depend on no layout. Buffers
that follow from the configuration (rotary frequencies, scales) are computed on the CPU and kept out of the model's
buffers: those are zeroed when a model gets its memory.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from components.layers.initialize import Constant, Init, Normal
from components.runtime.errors import ConfigError

USUAL = 0.02
"""Deviation where a configuration says none."""


@dataclass
class Derived:
    """A tensor that follows from the configuration."""

    module: nn.Module
    """Whose attribute it is."""
    name: str
    """The attribute."""
    value: Tensor
    """On the CPU."""

    def place(self, device: torch.device) -> None:
        """Let the module have it on that device, if it is in this stage."""
        if not isinstance(self.module, nn.Identity) and getattr(self.module, self.name).device != device:
            setattr(self.module, self.name, self.value.to(device))


@dataclass
class FirstValues:
    """What a model starts from."""

    inits: dict[int, Init] = field(default_factory=dict)
    """By the identity of the parameter."""
    derived: list[Derived] = field(default_factory=list)
    """Taken out of the model's buffers."""


def record(model: Any) -> FirstValues:
    """The first values of a model of transformers on the meta device. Its derived buffers become plain attributes.

    Raises ConfigError for a buffer that its own initialization leaves as it was.
    """
    found, recorder = FirstValues(), _Recorder()
    with torch.no_grad(), torch.device("cpu"):
        for module in _children_first(model):
            found.derived += _initialize(model, module, recorder)
    other = Normal(getattr(model.config, "initializer_range", None) or USUAL)
    for parameter in model.parameters():
        found.inits[id(parameter)] = recorder.found.get(id(parameter), other)
    for derived in found.derived:
        derived.module._buffers.pop(derived.name)  # torch has no public way to make a buffer an attribute
        derived.module._non_persistent_buffers_set.discard(derived.name)
        setattr(derived.module, derived.name, derived.value)
    return found


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _initialize(model: Any, module: nn.Module, recorder: TorchFunctionMode) -> list[Derived]:
    """Let the model initialize one of its modules, with buffers that have memory; what these come to."""
    shown = copy.copy(module)  # shares everything but the table of buffers
    shown.__dict__["_buffers"] = {
        name: None if buffer is None else _unwritten(buffer) for name, buffer in module._buffers.items()
    }
    with recorder:
        model._init_weights(shown)
    kept = []
    for name, value in shown._buffers.items():
        if value is None:
            continue
        where = f"{type(module).__name__}.{name}"
        if name not in module._non_persistent_buffers_set:
            if torch.is_nonzero(_written(value, 0.0).ne(0).any()):
                raise ConfigError(f"model.flavor: the saved buffer {where} starts from something else than zeros")
        elif torch.is_nonzero(_blank(value).any()):
            raise ConfigError(f"model.flavor: what the buffer {where} holds does not follow from the configuration")
        else:
            kept.append(Derived(module, name, value))
    return kept


def _unwritten(buffer: Tensor) -> Tensor:
    blank = math.nan if buffer.is_floating_point() else (torch.iinfo(buffer.dtype).min if buffer.dtype.is_signed else 0)
    return torch.full(buffer.shape, blank, dtype=buffer.dtype, device="cpu")


def _blank(value: Tensor) -> Tensor:
    """Where nothing was written; of what has no value to spare, nowhere."""
    if value.is_floating_point():
        return value.isnan()
    return value == torch.iinfo(value.dtype).min if value.dtype.is_signed else torch.zeros_like(value, dtype=torch.bool)


def _written(value: Tensor, otherwise: float) -> Tensor:
    return value.masked_fill(_blank(value), otherwise)


class _Recorder(TorchFunctionMode):
    """Notes what is written into parameters on the meta device, instead of writing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Init] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        init = _init(getattr(func, "__name__", ""), args[1:], kwargs) if isinstance(target, nn.Parameter) else None
        if init is None:
            return func(*args, **kwargs)
        self.found[id(target)] = init
        return target


def _init(name: str, args: Any, kwargs: dict[str, Any]) -> Init | None:
    """What a call in place does to its first argument, as an Init; None if it is none of those that we have."""
    if name == "normal_":
        given = dict(zip(("mean", "std"), args, strict=False)) | kwargs
        return Normal(float(given.get("std", 1.0))) if given.get("mean", 0.0) == 0 else None
    if name == "zero_":
        return Constant(0.0)
    if name in ("fill_", "constant_"):
        return Constant(float(args[0] if args else kwargs.get("val", kwargs.get("value", 0.0))))
    return None
