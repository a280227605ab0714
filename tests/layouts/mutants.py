"""Classic defects of parallel training, each planted by a small patch inside of the ranks. The matrix must see each.

A test that never failed proves nothing: a mutant shows that the comparison can fail, and for the right reason.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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


def drawn_by_local_index(patch: Patch) -> None:
    """Initial values drawn for the elements of the shard, not for their places in the whole."""
    import torch

    from components.mesh import counter

    def local(parameter: Any, chunk: int | None = None) -> Any:
        yield 0, torch.arange(parameter.to_local().numel())

    patch(counter, "global_indices", local)


def tensor_averaged(patch: Patch) -> None:
    """The gradient of a gathered sequence is averaged over the ranks that use it, not summed."""
    from components.mesh import collectives

    _divide_backward(patch, collectives._Gather)


def norms_not_summed(patch: Patch) -> None:
    """Norms that each rank uses on its piece of the sequence keep the gradient of that piece."""
    from components.mesh import collectives

    patch(collectives._SumGradient, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def heads_not_summed(patch: Patch) -> None:
    """Key-value heads that several ranks hold keep each rank's gradient."""
    from components.parallel import shares

    def take(self: Any, module: Any, leaf: str, dim: int, axis: Any) -> Any:
        found = shares.local(module, leaf)
        return found if found is None or not self.shared else found.narrow(dim, self.start, self.size)

    patch(shares.Span, "take", take)


def context_averaged(patch: Patch) -> None:
    """Gradients are divided by the ranks that share a sequence."""
    from trainer.trainer import Trainer

    original = Trainer.forward_backward
    patch(
        Trainer, "forward_backward", lambda self, b, valid, last: original(self, b, valid * self.dims.degrees.cp, last)
    )


def positions_not_cut(patch: Patch) -> None:
    """Every rank takes its tokens for the first of the row."""
    from trainer.trainer import Trainer

    original = Trainer.split

    def split(self: Trainer, batch: Any) -> Any:
        cut = original(self, batch)
        return replace(cut, positions=batch.positions[:, : cut.positions.shape[1]])

    patch(Trainer, "split", split)


def order_not_balanced(patch: Patch) -> None:
    """The causal mask takes each rank's tokens for neighbours, though head and tail are dealt together."""
    import torch

    from components.mesh.batch import Part

    def not_later(self: Part) -> Any:
        count = len(self.index)
        place = (
            torch.arange(count) + int(self.index[0] != 0) * count
        )  # of two ranks, the second has not the first token
        return place[:, None] >= torch.arange(self.length)

    patch(Part, "not_later", not_later)


def validation_times_context(patch: Patch) -> None:
    """Validation counts the loss of a sequence once for each rank that shares it."""
    from trainer.trainer import Trainer

    original = Trainer.evaluate

    def evaluate(self: Trainer, batch: Any) -> Any:
        whole = original(self, batch)
        return whole._replace(sums=whole.sums * self.dims.degrees.cp)

    patch(Trainer, "evaluate", evaluate)


def tokens_times_context(patch: Patch) -> None:
    """So does the count of tokens."""
    from trainer.trainer import Trainer

    original = Trainer.whole_rows

    def whole_rows(self: Trainer, local: Any) -> Any:
        whole = original(self, local)
        return whole._replace(counts=whole.counts * self.dims.degrees.cp)

    patch(Trainer, "whole_rows", whole_rows)


def pipeline_averaged(patch: Patch) -> None:
    """torch's schedules left to their default: the mean over microbatches."""
    from components.parallel.pipeline_run import Pipeline

    original = Pipeline._schedule

    def schedule(self: Pipeline, *sizes: Any, **where: Any) -> Any:
        made = original(self, *sizes, **where)
        made.scale_grads = True
        return made

    patch(Pipeline, "_schedule", schedule)


def tie_not_summed(patch: Patch) -> None:
    """The embedding keeps the gradient of the first stage, the head that of the last."""
    from components.parallel.pipeline_tied import TiedParameters

    patch(TiedParameters, "sum_gradients", lambda self: None)


def stage_without_documents(patch: Patch) -> None:
    """Stages after the first do not know where documents begin."""
    from components.parallel.pipeline_run import Pipeline

    original = Pipeline.train

    def train(self: Pipeline, batch: Any, inputs: dict[str, Any], valid: Any) -> Any:
        first = self.stages[0].first
        return original(self, batch, {n: v for n, v in inputs.items() if first or n != "document_ids"}, valid)

    patch(Pipeline, "train", train)


def norm_of_a_stage(patch: Patch) -> None:
    """Each stage clips by the norm of its own gradients."""
    from trainer import trainer

    original = trainer.gradient_norm
    patch(trainer, "gradient_norm", lambda parameters, group, device: original(parameters, None, device))


def experts_averaged(patch: Patch) -> None:
    """The gradients of tokens that come back from other ranks' experts are averaged over these ranks."""
    from components.mesh import collectives

    _divide_backward(patch, collectives._AllToAll)


def balance_times_microbatches(patch: Patch) -> None:
    """Each microbatch adds the whole balance loss."""
    from components.layers.moe import MoE

    original = MoE.balance
    patch(MoE, "balance", lambda self, probabilities, counts, shares: original(self, probabilities, counts, shares * 4))


def row_statistics_not_reduced(patch: Patch) -> None:
    """The balance loss takes each rank's piece of a row for the row."""
    _forget_ranks(patch, "row")


def bias_from_one_rank(patch: Patch) -> None:
    """Selection biases move by the tokens of one rank."""
    _forget_ranks(patch, "batch")


def _forget_ranks(patch: Patch, whose: str) -> None:
    from components.parallel import expert

    original = expert.TokenRanks
    patch(expert, "TokenRanks", lambda **ranks: original(**(ranks | {whose: ()})))


def _divide_backward(patch: Patch, function: Any) -> None:
    original = function.backward
    patch(function, "backward", staticmethod(lambda ctx, grad: original(ctx, grad / ctx.axis.size)))


def _mutant(
    axes: str, shows: str, plant: Callable[[Patch], None], model: str = "llama/untied", modifiers: str = ""
) -> Mutant:
    return Mutant(Layout(model, axes, modifiers), shows, plant)


MUTANTS = {
    "data: gradients averaged over ranks": _mutant(
        "fsdp=2", "gradients of layers.0.attention.wq.weight: off by 0.5", data_averaged
    ),
    "data: mean of means": _mutant("fsdp=2", "gradients of norm.weight", mean_of_means),
    "data: replicas not reduced": _mutant(
        "ddp=2 fsdp=2", "grad_norm", replicas_not_reduced, "llama/tied", "accumulate"
    ),
    "data: initial values by local index": _mutant("fsdp=2", "step 1: loss", drawn_by_local_index),
    "tensor: gradients of sequences averaged": _mutant(
        "tp=2", "gradients of layers.0.attention.wq.weight", tensor_averaged
    ),
    "tensor: gradients of norms not summed": _mutant("tp=2", "norm.weight", norms_not_summed),
    "tensor: replicated key-value heads not summed": _mutant("tp=4", "attention.wk.weight", heads_not_summed),
    "context: gradients averaged over ranks": _mutant("cp=2", "gradients of norm.weight: off by 0.5", context_averaged),
    "context: positions not cut": _mutant("cp=2", "step 1: loss", positions_not_cut),
    "context: causal order without load balance": _mutant("cp=2", "step 1: loss", order_not_balanced),
    "context: validation loss times ranks": _mutant("cp=2", "validation loss", validation_times_context),
    "context: token count times ranks": _mutant("cp=2", "tokens, not", tokens_times_context),
    "pipeline: gradients averaged over microbatches": _mutant("pp=2", "gradients of norm.weight", pipeline_averaged),
    "pipeline: tied embedding not summed": _mutant("pp=2", "differs from its copy", tie_not_summed, "llama/tied"),
    "pipeline: middle stages without documents": _mutant("pp=4", "step 1: loss", stage_without_documents, "llama/tied"),
    "pipeline: clipped by the norm of a stage": _mutant("pp=2", "tells", norm_of_a_stage),
    "expert: gradients averaged over ranks": _mutant("fsdp=2 ep=2", "gradients of", experts_averaged, "qwen/moe"),
    "expert: balance loss times microbatches": _mutant(
        "", "gradients of layers.0.moe.router.gate", balance_times_microbatches, "qwen/moe", "accumulate"
    ),
    "expert: statistics of a row not reduced": _mutant(
        "tp=2", "gradients of layers.0.moe.router.gate", row_statistics_not_reduced, "qwen/moe"
    ),
    "expert: selection bias from one rank": _mutant("fsdp=2 ep=2", "expert_bias", bias_from_one_rank, "qwen/moe"),
}
