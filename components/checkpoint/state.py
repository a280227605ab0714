"""What a checkpoint holds, by name. Tensors are `<part>.<name>`; all else is JSON under the name of its part.

Names are the canonical ones of the unsharded model, so that a checkpoint means the same on every layout. Pickled
objects were rejected: they run code when they are loaded, and bind a checkpoint to the classes of the day.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from components.runtime.errors import CheckpointError, ConfigError

V = TypeVar("V")
PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state", "rng")
"""The names that `checkpoint.exclude_from_loading` knows."""
ALL_BUT_MODEL = PARTS[1:]
"""What is excluded when only weights are taken."""


def model_tensors(model_parts: Sequence[nn.Module], copies: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """Parameters and persistent buffers as `model.<name>`; a tied parameter once, under its first name.

    The tensors are the model's own: loading into them changes the model. Goes through `state_dict`, whose hooks let
    FSDP put its shards back first. `copies` are left out: what another part holds under the same name. Raises
    CheckpointError for two parts with the same name otherwise, for state that is no tensor, and for a parameter or
    persistent buffer that a `state_dict` of its own leaves out: it would be at its initial value after a resume.
    """
    named: dict[str, Tensor] = {}
    seen = {id(copy) for copy in copies}
    for part in model_parts:
        for name, value in part.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"model.{name} is a {type(value).__name__}: a module's state must be tensors")
            if f"model.{name}" in named and id(value) not in seen:
                raise CheckpointError(f"model.{name} is in two model parts: names must be those of the whole model")
            if id(value) not in seen:
                seen.add(id(value))
                named[f"model.{name}"] = value
    if lost := sorted(name for part in model_parts for name, value in _stateful(part) if id(value) not in seen):
        raise CheckpointError(f"not in the model's state_dict, so that they could not be saved: {', '.join(lost)}")
    return named


def _stateful(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer by its place in the part."""
    yield from part.named_parameters()
    for place, module in part.named_modules():
        fleeting = module._non_persistent_buffers_set  # torch has no public way to ask
        for name, value in module.named_buffers(prefix=place, recurse=False):
            if name.rpartition(".")[2] not in fleeting:
                yield name, value


def optimizer_tensors(named_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Optimizer state, given as `<parameter>.<state>`, as `optimizer.<parameter>.<state>`."""
    return {f"optimizer.{name}": value for name, value in named_state.items()}


def of_model(named: Mapping[str, V]) -> dict[str, V]:
    """What belongs to the model."""
    return {name: value for name, value in named.items() if part_of(name) == "model"}


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    return name.partition(".")[0]


def without(named: Mapping[str, Any], exclude: Collection[str]) -> dict[str, Any]:
    """Entries (tensors or parts of the state) that belong to none of the excluded parts."""
    return {name: value for name, value in named.items() if part_of(name) not in exclude}


def check_exclude(exclude: Iterable[str]) -> None:
    """Raise ConfigError for names that are no parts."""
    problems = []
    for name in exclude:
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            problems.append(
                f"checkpoint.exclude_from_loading = {name!r}: no such part; allowed: {', '.join(PARTS)}{hint}"
            )
    if problems:
        raise ConfigError(*problems)


def state_problems(state: Mapping[str, Any], like: Mapping[str, Any]) -> list[str]:
    """Why a saved state is not of the same parts, keys and types as `like`; a line each."""
    saved, here = _outline(state), _outline(like)
    lost = [name for name in sorted({*here} - {*saved}) if part_of(name) in saved or name in like]
    extra = [name for name in sorted({*saved} - {*here}) if part_of(name) in here or name in state]
    problems = [f"missing in its state: {', '.join(lost)}"] if lost else []
    problems += [f"not expected in its state: {', '.join(extra)}"] if extra else []
    return problems + [
        f"{name} in its state: {saved[name]} saved, {here[name]} here"
        for name in sorted({*here} & {*saved})
        if saved[name] != here[name]
    ]


def _outline(state: Mapping[str, Any]) -> dict[str, str]:
    """Parts, and the keys in them as `<part>.<key>`, with the names of their types."""
    found = {part: type(value).__name__ for part, value in state.items()}
    for part, value in state.items():
        if isinstance(value, Mapping):
            found |= {f"{part}.{key}": type(inner).__name__ for key, inner in value.items()}
    return found


def require_plain(value: Any, where: str = "state") -> None:
    """Raise CheckpointError unless JSON gives `value` back exactly as it is: no tuples, no keys but strings, no NaN."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}: keys must be strings")
            require_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            require_plain(inner, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(f"{where} is a {type(value).__name__}: JSON cannot give it back as it is")
    elif isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"{where} is not a number (nan): save None instead")
