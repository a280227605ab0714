"""Jobs that stand still at chosen places, brought in by `experimental.custom_import` beside the tiny model.

HOLD = "where number seconds rank", any number of times: the number-th call of that place, counted from 1, marks the
files `{HOLD_MARK}{rank}` and `{rank}.{where}` beside it, and sleeps for so long, or under "inf" for ever. Rank "all"
means all ranks. Some places then fail instead of going on: "fail" (each save), "error" (waiting for data), "torn" (in
the midst of an update).
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._dynamo import register_backend
from torch.fx import GraphModule

from components.checkpoint.checkpointer import Checkpointer
from components.optim.optimizers import Optimizers
from components.runtime.errors import CheckpointError
from tests.trainer import tiny
from trainer.run_folder import RunFolder
from trainer.trainer import Trainer
from trainer.validator import Validator

__all__ = ["tiny"]


class Compiler:
    """`--compile.backend=standing`: changes nothing, and can be held in the midst of torch's tracing."""

    @staticmethod
    def compile(graph: GraphModule) -> Callable[..., Any]:
        """The graph as it is."""
        return graph.forward


@register_backend(name="standing")
def standing(graph: GraphModule, _: list[Any]) -> Callable[..., Any]:
    return Compiler.compile(graph)


PLACES: dict[str, tuple[type, str]] = {
    "compile": (Compiler, "compile"),
    "compute": (Trainer, "compute"),
    "data": (Trainer, "next_rows"),
    "validation": (Validator, "validate"),
    "step": (Optimizers, "step"),
    "save": (Checkpointer, "save"),
    "fail": (Checkpointer, "save"),
    "error": (Trainer, "next_rows"),
    "torn": (Optimizers, "step"),
    "close": (Trainer, "close"),
    "leave": (RunFolder, "of_worker"),  # its second call
}
FAILURES = {
    "fail": CheckpointError("cannot save: no space left, says the test"),
    "error": RuntimeError("something else is gone"),
    "torn": RuntimeError("a kernel has failed"),
}


def hold(where: str, number: int, seconds: float, rank: str) -> None:
    """Let the number-th call of a place begin with a long wait."""
    owner, name = PLACES[where]
    usual: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def held(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        own = os.environ.get("RANK", "0")
        if calls == number and rank in ("all", own):
            mark = Path(f"{os.environ['HOLD_MARK']}{own}")
            mark.with_name(f"{own}.{where}").touch()
            mark.touch()
            if math.isinf(seconds):
                reading, _ = os.pipe()
                os.read(reading, 1)  # in C, where no Python handler can run
            time.sleep(seconds)
            if where in FAILURES:
                raise FAILURES[where]
        return usual(*args, **named)

    setattr(owner, name, held)


words = os.environ.get("HOLD", "").split()
for place, count, length, at in zip(*[iter(words)] * 4, strict=True):
    hold(place, int(count), float(length), at)
