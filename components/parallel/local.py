"""Local tensors of DTensor parameters, for the code that computes with them.

Compiled code never sees the DTensors: a wrapper around each compiled block takes their local tensors before, leaves
them at the modules while the block runs, and removes them after. To let the compiler trace `to_local` was rejected: it
then keeps device meshes for backward, which together with recompute it takes for tensors (torch 2.13).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PREFIX = "local_of_"


def local(module: nn.Module, name: str) -> Any:
    """A module's own parameter (or None where it has none) as this rank holds it for compute: FSDP has gathered it
    over its own ranks by now. Gradients pass."""
    held: Tensor | None = getattr(module, PREFIX + name, None)
    if held is not None:
        return held
    parameter = getattr(module, name, None)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def with_locals(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, the forward of a block, with the local tensors of the block's DTensors laid out for it."""
    places = [(module, name) for module in block.modules() for name, _ in module.named_parameters(recurse=False)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        held = [(module, name) for module, name in places if isinstance(getattr(module, name), DTensor)]
        for module, name in held:
            module.__dict__[PREFIX + name] = getattr(module, name).to_local()  # past nn.Module, which would register it
        try:
            return compiled(*args, **kwargs)
        finally:
            for module, name in held:
                del module.__dict__[PREFIX + name]

    return forward
