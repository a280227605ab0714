"""torch.compile, per block and for the loss.

Blocks are compiled one by one rather than the whole model: equal blocks share one artifact, so that the cost does not
grow with depth, and FSDP's hooks stay outside, where they can overlap. A block's `forward` is replaced in place, which
keeps names clean; `Module.compile()` was rejected, since it compiles the hooks too.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from components.config.compute import Compile
from components.mesh.plan import Plan
from components.parallel.local import with_locals
from components.parallel.modules import find
from components.runtime.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def compile_blocks(model: nn.Module, plan: Plan, config: Compile) -> None:
    """Replace the `forward` of every block by its compiled form, if `[compile]` says so.

    Without graph breaks, which would cost silently what compiling gains; only blocks that hold modules of other
    precision or experts may break, at the hooks that gather those and at dispatch, whose sizes are data.
    """
    if not config.enable or "model" not in config.components:
        return
    _require_backend(config)
    for block in find(model, plan.blocks).values():
        whole = not (plan.fp32 or plan.experts)
        block.forward = with_locals(block, torch.compile(block.forward, backend=config.backend, fullgraph=whole))


def compile_loss(loss: Callable[P, R], config: Compile) -> Callable[P, R]:
    """The loss, compiled if `[compile]` says so. Graphs may break where it calls a head that has hooks."""
    if not config.enable or "loss" not in config.components:
        return loss
    _require_backend(config)
    return torch.compile(loss, backend=config.backend)


def _require_backend(config: Compile) -> None:
    """Raise ConfigError for a back end that torch does not know."""
    known = torch.compiler.list_backends(exclude_tags=())
    if config.backend not in known:
        names = ", ".join(sorted(torch.compiler.list_backends()))
        raise ConfigError(
            f"compile.backend = {config.backend!r}: no such back end; allowed: {names}, and those for debugging"
        )
