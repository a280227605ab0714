import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from components.config.training import Loss
from components.loss.cross_entropy import (
    ChunkedCrossEntropy,
    CrossEntropy,
    Judge,
    LossFn,
    build_loss,
    losses,
    shard_losses,
    token_losses,
)
from components.loss.names import LOSSES
from components.mesh.batch import IGNORE, Batch, RowLoss
from components.mesh.collectives import Axis, sizes_of
from components.mesh.projection import Projection, VocabularyShard
from components.runtime.errors import ConfigError
from tests.ranks import run_ranks

ROWS, SEQ, DIM, VOCAB = 4, 10, 8, 50
BOTH = [CrossEntropy(), ChunkedCrossEntropy(7), ChunkedCrossEntropy(ROWS * SEQ), ChunkedCrossEntropy(1000)]


class _Head(nn.Linear):
    """The contract of a model's head, and how often it was called."""

    calls = 0

    def forward(self, input: Tensor, apply: Callable[[Tensor, Projection], Any] | None = None) -> Any:
        self.calls += 1
        project = Projection(super().forward)
        return project(input) if apply is None else apply(input, project)


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, _Head, Batch]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, SEQ, DIM, generator=generator).to(dtype).requires_grad_()
    head = _Head(DIM, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, DIM, generator=generator))
    labels = torch.randint(VOCAB, (ROWS, SEQ), generator=generator)
    labels[0, :3] = IGNORE
    labels[2] = IGNORE
    return hidden, head.to(dtype), Batch(labels, labels, labels, labels)


def _run(loss: LossFn, dtype: torch.dtype = torch.float32) -> tuple[RowLoss, Tensor, Tensor]:
    hidden, head, batch = _problem(dtype)
    rows = loss(hidden, head, batch)
    (rows.sums.sum() / rows.counts.sum()).backward()
    assert head.calls == 1
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return rows, hidden.grad, head.weight.grad


def _reference() -> tuple[list[float], Tensor, Tensor]:
    """Row by row with torch's own sums, and the mean that they amount to."""
    hidden, head, batch = _problem()
    logits = F.linear(hidden, head.weight)
    sums = [
        F.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum").item()
        for x, y in zip(logits, batch.labels, strict=True)
    ]
    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE).backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return sums, hidden.grad, head.weight.grad


def test_names_without_torch_are_the_registered_ones() -> None:
    assert set(losses) >= set(LOSSES)


@pytest.mark.shows("loss.name", "loss.chunk_tokens")
def test_build() -> None:
    assert build_loss(Loss()) == CrossEntropy()
    assert build_loss(Loss(name="chunked_cross_entropy", chunk_tokens=96)) == ChunkedCrossEntropy(96)
    with pytest.raises(ConfigError) as caught:
        build_loss(Loss(name="crossentropy"))
    assert str(caught.value) == (
        "loss.name = 'crossentropy': no such loss; allowed: chunked_cross_entropy, cross_entropy"
        " (did you mean 'cross_entropy'?)"
    )


@pytest.mark.parametrize("loss", BOTH)
def test_values_and_gradients(loss: LossFn) -> None:
    sums, of_hidden, of_weight = _reference()
    rows, hidden, weight = _run(loss)
    assert rows.counts.tolist() == [7, 10, 0, 10]
    assert (rows.sums.dtype, rows.counts.dtype) == (torch.float32, torch.int64)
    assert rows.sums.tolist() == pytest.approx(sums, rel=1e-6, abs=0)
    torch.testing.assert_close(hidden, of_hidden, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weight, of_weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", BOTH[1:])
def test_chunks_change_nothing(loss: LossFn) -> None:
    plain, chunked = _run(CrossEntropy()), _run(loss)
    torch.testing.assert_close(chunked[0].sums, plain[0].sums, rtol=1e-6, atol=1e-6)
    for mine, other in zip(chunked[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", BOTH)
def test_row_without_labels_is_exactly_zero(loss: LossFn) -> None:
    rows, hidden, _ = _run(loss)
    assert rows.sums[2].item() == 0.0
    assert not hidden[2].any()
    assert not hidden[0, :3].any()
    assert hidden[1].any()


@pytest.mark.parametrize("loss", BOTH)
def test_no_labels_at_all(loss: LossFn) -> None:
    hidden, head, batch = _problem()
    batch.labels.fill_(IGNORE)
    rows = loss(hidden, head, batch)
    rows.sums.sum().backward()
    assert rows.sums.tolist() == [0.0] * ROWS
    assert rows.counts.tolist() == [0] * ROWS
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("loss", BOTH)
def test_bfloat16_hidden_gives_fp32_sums(loss: LossFn) -> None:
    hidden, head, batch = _problem(torch.bfloat16)
    rows = loss(hidden, head, batch)
    logits = F.linear(hidden, head.weight).float()
    sums = [
        F.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum").item()
        for x, y in zip(logits, batch.labels, strict=True)
    ]
    assert rows.sums.dtype == torch.float32
    assert rows.sums.tolist() == pytest.approx(sums, rel=1e-5, abs=0)


@pytest.mark.parametrize("loss", BOTH)
def test_without_gradients(loss: LossFn) -> None:
    hidden, head, batch = _problem()
    with torch.no_grad():
        rows = loss(hidden, head, batch)
    assert rows.sums.tolist() == pytest.approx(_reference()[0], rel=1e-6, abs=0)
    assert not rows.sums.requires_grad


class _Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_chunks_never_hold_the_logits_of_all_tokens() -> None:
    def largest(loss: LossFn) -> int:
        with _Largest() as seen:
            _run(loss)
        return seen.elements

    assert largest(CrossEntropy()) == ROWS * SEQ * VOCAB
    assert largest(ChunkedCrossEntropy(10)) == 10 * VOCAB
    assert largest(ChunkedCrossEntropy(3)) == VOCAB * DIM  # the weight's gradient, by then


def test_part_to_compile_can_be_replaced() -> None:
    for loss in BOTH[:2]:
        zero = dataclasses.replace(loss, judge=Judge(lambda logits, labels: logits.sum(-1) * 0))
        assert _run(zero)[0].sums.tolist() == [0.0] * ROWS


def _sharded(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses of tokens from this rank's logits, and the gradient of those."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    logits, labels = _tokens(vocab)
    axis = Axis(init_device_mesh("cpu", (ranks,)).get_group(), ranks, rank)
    shard = VocabularyShard(axis, vocab, sizes_of(vocab, ranks)[rank])
    mine = logits.to(dtype)[:, shard.start : shard.start + shard.size].requires_grad_()
    values = shard_losses(mine, labels, shard)
    (values * torch.arange(1.0, 9.0)).sum().backward()
    assert mine.grad is not None
    return values.detach(), mine.grad


def _tokens(vocab: int) -> tuple[Tensor, Tensor]:
    """Logits of eight tokens, some of them large, and labels: every second one is missing. # (8, vocab), (8,)"""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, vocab, generator=generator) * torch.tensor([1.0, 50.0]).repeat(4)[:, None] + 300.0
    labels = torch.randint(vocab, (8,), generator=generator)
    labels[[2, 5, 6]] = IGNORE
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "ranks"), [(50, 2), (50, 3), (5, 4)])  # 5 over 4: the last rank has nothing
def test_a_sharded_vocabulary_gives_the_same(vocab: int, ranks: int, dtype: torch.dtype) -> None:
    logits, labels = _tokens(vocab)
    logits = logits.to(dtype).requires_grad_()
    want = token_losses(logits, labels)
    (want * torch.arange(1.0, 9.0)).sum().backward()
    found = run_ranks(ranks, _sharded, vocab, dtype)
    gradient = torch.cat([grad for _, grad in found], dim=1)
    torch.testing.assert_close(gradient, logits.grad)
    assert gradient.dtype == dtype
    assert not gradient[labels == IGNORE].any()
    for values, _ in found:
        torch.testing.assert_close(values, want.detach())
        assert not values[labels == IGNORE].any()
