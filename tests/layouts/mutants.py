"""Classic defects of parallel training, each planted by a small patch inside of the ranks. The matrix must see each.

A test that never failed proves nothing: a mutant shows that the comparison can fail, and for the right reason.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.layouts.layout import Layout

Patch = Callable[[object, str, Any], None]
"""(object, attribute, value) until the run's end."""


@dataclass(frozen=True)
class Mutant:
    """A defect, and a layout that must show it."""

    layout: Layout
    shows: str
    """What the comparison must say, among other things: that it is seen for the right reason."""
    plant: Callable[[Patch], None]
    """Makes the patches. Called in every rank, before the Trainer is built."""


@contextmanager
def planted(name: str) -> Generator[None]:
    """Run with a defect; with the empty name without one."""
    with ExitStack() as stack:
        if name:
            MUTANTS[name].plant(lambda target, key, value: stack.enter_context(mock.patch.object(target, key, value)))
        yield


def data_averaged(patch: Patch) -> None:
    """FSDP left to its default: the mean over ranks."""
    from components.parallel import data

    patch(data, "_sum_gradients", lambda model: None)


def mean_of_means(patch: Patch) -> None:
    """Each microbatch is divided by its own valid tokens, and these means are averaged, those of no token too."""
    from trainer.trainer import Trainer

    original = Trainer.forward_backward

    def forward_backward(self: Trainer, batch: Any, valid: Any, last: bool) -> Any:
        means = self.job.training.global_batch_size // batch.rows
        return original(self, batch, (batch.labels >= 0).sum().clamp(min=1) * means, last)

    patch(Trainer, "forward_backward", forward_backward)


def replicas_not_reduced(patch: Patch) -> None:
    """The all-reduce over replicas is left out at the last microbatch too."""
    from trainer import trainer

    original = trainer.set_gradient_sync
    patch(trainer, "set_gradient_sync", lambda model, last: original(model, False))


MUTANTS = {
    "data: gradients averaged over ranks": Mutant(
        Layout("llama/untied", "fsdp=2"), "gradients of layers.0.attention.wq.weight: off by 0.5", data_averaged
    ),
    "data: mean of means": Mutant(Layout("llama/untied", "fsdp=2"), "gradients of norm.weight", mean_of_means),
    "data: replicas not reduced": Mutant(
        Layout("llama/tied", "ddp=2 fsdp=2", "accumulate"), "grad_norm", replicas_not_reduced
    ),
}
