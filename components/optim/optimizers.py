"""Optimizers: one torch optimizer over all model parts, its parameter groups by name, and its state by name.

State is a flat dict of tensors under canonical parameter names, so that a checkpoint does not depend on how parameters
are numbered, grouped or dealt to pipeline stages, and loading writes into the very tensors that the next step reads.
One optimizer per part, as TorchTitan has it, was rejected: groups already do what parts would.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.config.optim import Optimizer, ParameterGroup
from components.mesh.registry import Registry
from components.runtime.errors import ConfigError

Groups = list[dict[str, Any]]
"""Parameter groups as torch.optim takes them: `params`, `lr` and `weight_decay` are set."""

OptimizerFactory = Callable[[Groups, Optimizer, torch.device], torch.optim.Optimizer]
"""Makes an optimizer from groups, the `[optimizer]` section, and the device of the parameters."""

optimizers: Registry[OptimizerFactory] = Registry("optimizer", "optimizer.name")


class Follower(Protocol):
    """What learns from a step without a gradient."""

    def step(self) -> None:
        """The parameters have moved."""
        ...

    def reset(self) -> None:
        """The gradients have been freed, after a step or without one."""
        ...


class Optimizers:
    """All parameters' optimizer: stepping, the learning rate, and the state to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], lr: float) -> None:
        self._optimizer, self._names, self._peak_lr, self._factor = optimizer, names, lr, 1.0
        self._group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._followers: list[Follower] = []

    def follow(self, follower: Follower) -> None:
        """Let something be told of each step from now on."""
        self._followers.append(follower)

    @property
    def lr(self) -> float:
        """Learning rate of parameters without a group of their own."""
        return self._peak_lr * self._factor

    def set_lr_factor(self, factor: float) -> None:
        """Let every group's learning rate be `factor` times its peak."""
        self._factor = factor
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def step(self) -> None:
        """One optimizer step from the gradients that are there."""
        self._optimizer.step()
        for follower in self._followers:
            follower.step()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are stepped."""
        return [*self._names]

    def step_one(self, parameter: nn.Parameter) -> None:
        """One optimizer step of this parameter alone, with its group's settings and its own state."""
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**self._group_of[parameter], "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups

    def zero_grad(self) -> None:
        """Free all gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        for follower in self._followers:
            follower.reset()

    def named_state(self) -> dict[str, Tensor]:
        """The state's own tensors by `<parameter>.<state>`, to save from or to load into in place.

        State that no step has made yet is made first, which changes no parameter. Raises ConfigError for an optimizer
        that keeps something else than tensors.
        """
        self._materialize()
        state: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            for key, value in self._optimizer.state[parameter].items():
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        f"optimizer.name: its state {key!r} is a {type(value).__name__}: only tensors can be saved"
                    )
                state.setdefault(f"{name}.{key}", value)  # of a name that two parts hold, the first part's
        return state

    def copy_state(self, source: nn.Parameter, target: nn.Parameter) -> None:
        """Give one parameter's state to another, laid out alike."""
        self._materialize()
        for key, value in self._optimizer.state[source].items():
            self._optimizer.state[target][key].copy_(value)

    def bytes(self) -> int:
        """Bytes of state on this rank; 0 before the first step or `named_state`."""
        values = (value for state in self._optimizer.state.values() for value in state.values())
        return sum(_local(value).nbytes for value in values if isinstance(value, Tensor))

    def _materialize(self) -> None:
        """Make missing state by a step from zero gradients at learning rate and decay 0, then set its counters back."""
        missing = [p for p in self._names if not self._optimizer.state.get(p)]
        if not missing:
            return
        groups, gradients = self._optimizer.param_groups, {p: p.grad for p in self._names}
        kept = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in groups]
        for parameter in self._names:
            parameter.grad = None
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        for group, values in zip(groups, kept, strict=True):
            group.update(dict.fromkeys(values, 0.0))
        self._optimizer.step()
        for group, values in zip(groups, kept, strict=True):
            group.update(values)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for parameter in missing:
            if isinstance(counter := self._optimizer.state[parameter].get("step"), Tensor):
                counter.zero_()


def build_optimizers(model_parts: list[nn.Module], config: Optimizer, device: torch.device) -> Optimizers:
    """One optimizer over the trainable parameters of all parts.

    Raises ConfigError for an unknown name, a kernel that the device lacks, and, all at once, for patterns of
    `optimizer.parameter_groups` that are no regular expressions. Whether each takes something is `require_used`'s
    business.
    """
    names = {p: name for part in model_parts for name, p in part.named_parameters() if p.requires_grad}
    groups = _groups(names, config)
    return Optimizers(optimizers.lookup(config.name)(groups, config, device), names, config.lr)


def kernel(make: type[torch.optim.Optimizer], config: Optimizer, device: torch.device) -> dict[str, bool]:
    """torch's arguments for `optimizer.implementation`; `auto` is fused where the device has it, else foreach.

    Raises ConfigError where fused is asked for and not there.
    """
    if config.implementation in ("foreach", "for-loop"):
        return {"foreach": config.implementation == "foreach", "fused": False}
    if _has_fused(make, device):
        return {"foreach": False, "fused": True}
    if config.implementation == "auto":
        return {"foreach": True, "fused": False}
    raise ConfigError(
        f"optimizer.implementation = 'fused': {config.name} has no fused kernel on {device.type};"
        " allowed: auto, foreach, for-loop"
    )


def _has_fused(make: Callable[..., torch.optim.Optimizer], device: torch.device) -> bool:
    """Torch has no public list of devices with fused kernels, so ask the constructor."""
    try:
        make([nn.Parameter(torch.zeros(1, device=device))], fused=True)
    except RuntimeError:
        return False
    return True


def _groups(names: dict[nn.Parameter, str], config: Optimizer) -> Groups:
    """Parameters by the first entry that matches them, then by mesh: no kernel takes two meshes at once."""
    entries = [*config.parameter_groups, ParameterGroup(pattern="")]  # the last takes what is left
    owners = _owners(names.values(), config.parameter_groups)
    groups: dict[tuple[int, object], list[nn.Parameter]] = {}
    for parameter, name in names.items():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((owners[name], mesh), []).append(parameter)
    return [_group(parameters, entries[index], config) for (index, _), parameters in groups.items()]


def _group(parameters: list[nn.Parameter], entry: ParameterGroup, config: Optimizer) -> dict[str, Any]:
    decay = config.weight_decay if entry.weight_decay is None else entry.weight_decay
    return {"params": parameters, "lr": config.lr * entry.lr_factor, "weight_decay": decay}


def require_used(names: Sequence[str], entries: Sequence[ParameterGroup]) -> None:
    """Raise ConfigError, all at once, for entries that take no parameter. `names` are those of the whole model: a
    pipeline stage may well have none of an entry's."""
    owners = _owners(names, entries)
    idle = [i for i in range(len(entries)) if i not in owners.values()]
    if idle:
        patterns = _compile(entries)
        raise ConfigError(*(_idle(i, patterns[i], list(names), owners) for i in idle))


def _owners(names: Iterable[str], entries: Sequence[ParameterGroup]) -> dict[str, int]:
    """For each name the index of the first entry that matches it, or `len(entries)`."""
    patterns = _compile(entries)
    return {n: next((i for i, p in enumerate(patterns) if p.search(n)), len(entries)) for n in names}


def _compile(entries: Sequence[ParameterGroup]) -> list[re.Pattern[str]]:
    patterns, problems = [], []
    for i, entry in enumerate(entries):
        try:
            patterns.append(re.compile(entry.pattern))
        except re.error as error:
            problems.append(
                f"optimizer.parameter_groups[{i}].pattern = {entry.pattern!r}: no regular expression: {error}"
            )
    if problems:
        raise ConfigError(*problems)
    return patterns


def _idle(index: int, pattern: re.Pattern[str], names: list[str], owners: dict[str, int]) -> str:
    where = f"optimizer.parameter_groups[{index}].pattern = {pattern.pattern!r}"
    matched = [name for name in names if pattern.search(name)]
    if matched:
        earlier = ", ".join(str(i) for i in sorted({owners[name] for name in matched}))
        return f"{where}: earlier entries ({earlier}) take all that it matches; put it before them, or remove it"
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return f"{where}: matches no parameter; there are: {', '.join(kinds)}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@optimizers.decorator("Adam")
def _adam(groups: Groups, config: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    chosen = kernel(torch.optim.Adam, config, device)
    return torch.optim.Adam(groups, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, **chosen)


@optimizers.decorator("AdamW")
def _adamw(groups: Groups, config: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    chosen = kernel(torch.optim.AdamW, config, device)
    return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, **chosen)
