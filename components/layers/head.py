"""The output head: a linear layer that a loss can run inside of.

A loss in chunks wants to project a few tokens at a time; but FSDP gathers the head's weight in hooks around
`forward`, and those must fire once, not once per chunk. So the loss hands its work to `forward`, which runs it with a
`project` function. Handing out the weight instead was rejected: it would bypass the hooks, and whatever a converter
does to the layer. Tensor parallelism replaces `forward` by its own, which keeps the same contract over a sharded
vocabulary.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from components.mesh.projection import Projection


class Head(nn.Linear):
    """Hidden states to logits, without bias."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def forward(self, input: Tensor, apply: Callable[[Tensor, Projection], Any] | None = None) -> Any:
        """Logits of `input` (rows, seq, dim); or with `apply`, what `apply(input, project)` returns.

        That result's tensors must be reachable as a pytree (tensor, tuple, NamedTuple, list, dict), where FSDP looks
        for them to know when backward arrives.
        """
        project = Projection(super().forward)
        return project(input) if apply is None else apply(input, project)
