"""Tensor parallelism: loss and every gradient are those of a plain model in one process."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.config.compute import ActivationCheckpoint, Compile
from components.config.job_config import JobConfig
from components.config.parallelism import Parallelism
from components.config.training import Loss
from components.layers.initialize import initialize
from components.loss.cross_entropy import build_loss
from components.mesh.batch import IGNORE, Batch
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.optim.clip import gradient_norm
from models.llama3.args import Llama3Args
from models.llama3.model import Llama3
from models.llama3.spec import load
from tests.ranks import run_ranks
from tests.whole import whole_gradients
from trainer.build import build_stages

ARGS = Llama3Args(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=50)
TIED = replace(ARGS, tied_embeddings=True)
THREE = replace(ARGS, n_heads=3, n_kv_heads=3)
ROWS, SEQ = 4, 12


@dataclass(frozen=True)
class Result:
    """Loss of the rows that a rank has read, the norm of all gradients, and each of them, whole."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def rows() -> Batch:
    """Documents of different lengths in each row, and labels that are missing. # (ROWS, SEQ)"""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (ROWS, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, :5], labels[3] = IGNORE, IGNORE
    cuts = torch.tensor([[5], [1], [SEQ], [8]])
    at = torch.arange(SEQ).expand(ROWS, SEQ)
    documents = (at >= cuts).long()
    return Batch(tokens[:, :-1], labels, at - documents * cuts, documents)


def plain(args: Llama3Args) -> Result:
    """The reference: the model as it is, the loss as PyTorch has it."""
    model, batch = Llama3(args), rows()
    initialize(model, model.inits(), seed=3)
    logits = model.output(model(batch.tokens, batch.positions, batch.document_ids))
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(loss.item(), torch.stack([g.norm() for g in found.values()]).norm().item(), found)


def step(args: Llama3Args, degrees: Degrees, job: JobConfig, dtype: torch.dtype = torch.float32) -> Result:
    """One step in two microbatches, each rank on its own rows."""
    dims = ParallelDims.build(degrees, "cpu")
    model: Any = build_stages(load(), args, job, dims, torch.device("cpu"), dtype, seed=3)[0].module
    loss, batch = build_loss(job.loss), rows()
    valid, total = (batch.labels != IGNORE).sum(), 0.0
    for row in range(dims.data_rank, ROWS, dims.data_degree):
        piece = batch.slice(row, row + 1)
        hidden = model(piece.tokens, piece.positions, piece.document_ids)
        found = loss(hidden, model.output, piece)
        (found.sums.sum() / valid).backward()
        total += (found.sums.sum() / valid).item()
    return Result(total, gradient_norm(model.parameters()).item(), whole_gradients(model))


def compare(args: Llama3Args, degrees: Degrees, job: JobConfig) -> None:
    """All ranks have all gradients of the plain model; the ranks that read different rows, its loss together."""
    want = plain(args)
    results: list[Result] = run_ranks(degrees.world, step, args, degrees, job, timeout=120)
    assert sum(r.loss for r in results) / degrees.tp == pytest.approx(want.loss, rel=1e-6)
    for found in results:
        assert found.norm == pytest.approx(want.norm, rel=1e-5)
        assert found.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            error = (found.gradients[name] - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm(), 1e-3 * want.norm), name


CHUNKED = JobConfig(loss=Loss(name="chunked_cross_entropy", chunk_tokens=5))
BY_OP = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="selective", selective_ac_option="op"))
COMPILED = JobConfig(compile=Compile(enable=True, backend="aot_eager"))
NONE, FULL = ActivationCheckpoint(mode="none"), ActivationCheckpoint(mode="full")
GATHERED = Parallelism(disable_loss_parallel=True)


@pytest.mark.parametrize(
    ("args", "degrees", "job"),
    [
        pytest.param(ARGS, Degrees(tp=2), JobConfig(), id="tp 2"),
        pytest.param(THREE, Degrees(tp=3), JobConfig(), id="tp 3, nothing divides"),
        pytest.param(ARGS, Degrees(tp=4), JobConfig(), id="tp 4, two kv heads"),
        pytest.param(replace(ARGS, n_kv_heads=1), Degrees(tp=4), JobConfig(), id="tp 4, one kv head"),
        pytest.param(replace(ARGS, vocab_size=50, ffn_hidden=5), Degrees(tp=4), JobConfig(), id="tp 4, empty shards"),
        pytest.param(ARGS, Degrees(dp_shard=2, tp=2), JobConfig(), id="fsdp 2, tp 2"),
        pytest.param(TIED, Degrees(tp=2), JobConfig(), id="tp 2, tied"),
        pytest.param(TIED, Degrees(dp_replicate=2, tp=2), CHUNKED, id="ddp 2, tp 2, tied, chunked"),
        pytest.param(THREE, Degrees(tp=3), JobConfig(parallelism=GATHERED), id="tp 3, logits gathered"),
        pytest.param(THREE, Degrees(tp=3), CHUNKED, id="tp 3, chunked"),
        pytest.param(ARGS, Degrees(tp=4), replace(CHUNKED, parallelism=GATHERED), id="tp 4, chunked, gathered"),
        pytest.param(ARGS, Degrees(dp_shard=2, tp=2), BY_OP, id="fsdp 2, tp 2, recompute by op"),
        pytest.param(THREE, Degrees(tp=3), COMPILED, id="tp 3, compiled"),
        pytest.param(THREE, Degrees(tp=3), replace(COMPILED, activation_checkpoint=NONE), id="tp 3, compiled, none"),
        pytest.param(THREE, Degrees(tp=3), replace(COMPILED, activation_checkpoint=FULL), id="tp 3, compiled, full"),
    ],
)
def test_every_gradient_is_the_plain_models(args: Llama3Args, degrees: Degrees, job: JobConfig) -> None:
    compare(args, degrees, job)
