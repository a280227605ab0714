"""Recompute (activation checkpointing): blocks keep less for backward and compute it again.

`full` keeps a block's inputs only: least memory, one more forward pass, about a third more FLOPs. `selective` with an
integer n does so to every n-th block. `selective` with `op` works inside of each block: what is expensive to compute is
kept, what is cheap is computed again; of matmuls, which are expensive to keep as well, every second one is.
`memory_budget` leaves the choice to the compiler, which knows each block's graph: the least recomputation that keeps no
more than a share of what it would keep by itself.

A block's `forward` is replaced in place. Wrapper modules were rejected: they put a prefix into every parameter's name,
and names are keys of checkpoints, of initialization and of optimizer groups.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from components.config.compute import ActivationCheckpoint
from components.mesh.plan import Plan
from components.parallel.modules import find
from components.runtime.errors import ConfigError

MATMULS = {"aten::mm": 1, "aten::addmm": 2, "aten::_grouped_mm": 1}
"""Matrix products, of which `op` keeps the first, third, …; and which of their arguments is the weight, transposed."""


COMPILED, FLEX = "inductor_compiled_code", "flex_attention"
"""What torch calls a kernel that is compiled apart from its block, and the only one that is here."""


DRAWINGS = "memory_budget_pareto"
"""Folder inside `dump_folder` for drawings of what other budgets would cost."""


def recompute(
    model: nn.Module, plan: Plan, config: ActivationCheckpoint, dump_folder: Path | str = ".", *, compiled: bool = False
) -> None:
    """Replace the `forward` of blocks, as `[activation_checkpoint]` says. Values and gradients stay the same.

    `compiled`: blocks will be compiled, which a memory budget needs; its drawings go into `dump_folder`. Raises
    ConfigError for a `selective_ac_option` that is neither an integer of at least 1 nor `op`, and settings that exclude
    each other.
    """
    _set_budget(config, Path(dump_folder))
    if config.mode == "memory_budget" and not compiled:
        raise ConfigError('activation_checkpoint.mode = "memory_budget": needs compiled blocks, see compile.enable')
    if config.mode in ("none", "memory_budget"):
        return
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    settings: dict[str, Any] = {"context_fn": _contexts(model, config)} if by_op else {}
    settings |= {
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    every = 1 if by_op or config.mode == "full" else _every(config.selective_ac_option)
    for i, block in enumerate(find(model, plan.blocks).values(), start=1):
        if i % every == 0:
            block.forward = _recomputed(block.forward, settings)


def _set_budget(config: ActivationCheckpoint, dump_folder: Path) -> None:
    """Tell the partitioner of compiled graphs how much it may keep. It is set for the process, so without a budget it
    is set back."""
    budgeted = config.mode == "memory_budget"
    draws = budgeted and config.visualize_memory_budget_pareto
    if draws and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "activation_checkpoint.visualize_memory_budget_pareto = true: drawing needs the package matplotlib: install"
            " it, or set this to false"
        )
    settings: dict[str, Any] = {"activation_memory_budget": config.memory_budget if budgeted else 1.0}
    settings["visualize_memory_budget_pareto"] = draws
    settings["memory_budget_pareto_dir"] = str(dump_folder / DRAWINGS)
    # The switches have no public name; `torch.compile(options=...)` takes only those of inductor.
    partitioner = importlib.import_module("torch._functorch.config")
    for name, value in settings.items():
        setattr(partitioner, name, value)


def _every(option: str) -> int:
    if not option.isdecimal() or int(option) < 1:
        raise ConfigError(
            f"activation_checkpoint.selective_ac_option = {option!r}: allowed are an integer n of at least 1, "
            "which recomputes every n-th block, and 'op'"
        )
    return int(option)


def _recomputed(forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **settings, **kwargs)

    return recomputed


def _contexts(model: nn.Module, config: ActivationCheckpoint) -> Callable[[], Any]:
    """What `checkpoint` asks for at each call of a block: contexts for its forward pass and for its recomputation."""
    if config.debug:
        raise ConfigError(
            "activation_checkpoint.debug = true cannot go with selective_ac_option = 'op': "
            "set debug to false, or selective_ac_option to an integer"
        )
    _require_ops(config.saved_ops)
    kept = frozenset(config.saved_ops)
    cheap = _weight_shapes(model, config.per_op_sac_force_recompute_mm_shapes_by_fqns)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(_policy(kept, cheap))

    return contexts


def _policy(kept: frozenset[str], cheap: frozenset[tuple[int, ...]]) -> Callable[..., CheckpointPolicy]:
    """Decides for each operation of one call of a block; it counts matmuls, apart for forward and recomputation."""
    matmuls = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name()
        keep = (FLEX if name == COMPILED else name) in kept
        if name in MATMULS and tuple(args[MATMULS[name]].shape) not in cheap:
            matmuls[context.is_recompute] += 1
            keep = matmuls[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _require_ops(names: list[str]) -> None:
    """Raise ConfigError for names that no operation of torch has; without a namespace it is a higher-order one's."""
    for name in names:
        namespace, _, leaf = name.rpartition("::")
        if not leaf or not hasattr(getattr(torch.ops, namespace or "higher_order"), leaf):
            raise ConfigError(
                f"activation_checkpoint.saved_ops: torch has no operation {name!r}; name one as namespace::name, such"
                " as aten::mm"
            )


def _weight_shapes(model: nn.Module, names: list[str]) -> frozenset[tuple[int, ...]]:
    """Shapes of the transposed weights of the linear layers whose name contains one of `names`."""
    found = {name: module for name, module in model.named_modules() if any(part in name for part in names)}
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns: {name} is a "
                f"{type(module).__name__}, but only linear layers have a matmul to recompute: name one of those"
            )
    linears = [module.weight for module in found.values() if isinstance(module, nn.Linear)]
    weights = [w.to_local() if isinstance(w, DTensor) else w for w in linears]  # what this rank multiplies with
    return frozenset(tuple(reversed(weight.shape)) for weight in weights)
