"""Tensor parallelism: loss and every gradient are those of a plain model in one process."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from components.config.compute import ActivationCheckpoint, Compile
from components.config.job_config import JobConfig
from components.config.parallelism import Comm, Parallelism
from components.config.training import Loss, Training
from components.layers.attention import Attention
from components.layers.initialize import initialize
from components.mesh.batch import IGNORE, Batch
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns
from components.optim.clip import gradient_norm
from components.parallel.context import split_sequence
from components.parallel.tensor import tensor
from components.runtime.errors import MeshError
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan, parallelize_decoder
from models.llama3.args import Llama3Args
from models.llama3.spec import load
from models.train_spec import build_default_loss
from tests.components.parallel.kinds import KindArgs, drawn, of_kind
from tests.ranks import run_ranks
from tests.whole import whole, whole_gradients
from trainer.build import build_stages

ARGS = Llama3Args(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=50)
TIED = replace(ARGS, tied_embeddings=True)
ONE_KV = replace(ARGS, n_kv_heads=1)
NARROW = replace(ARGS, ffn_hidden=5, vocab_size=5)
THREE = replace(ARGS, n_heads=3, n_kv_heads=3)
SIX = replace(ARGS, n_heads=6, n_kv_heads=3)
ROWS, SEQ = 4, 12


@dataclass(frozen=True)
class Result:
    """Loss of the rows that a rank has read, the norm of all gradients, and each of them, whole."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def rows(vocab_size: int) -> Batch:
    """Documents of different lengths in each row, and labels that are missing. # (ROWS, SEQ)"""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (ROWS, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, :5], labels[3] = IGNORE, IGNORE
    cuts = torch.tensor([[5], [1], [SEQ], [8]])
    at = torch.arange(SEQ).expand(ROWS, SEQ)
    documents = (at >= cuts).long()
    return Batch(tokens[:, :-1], labels, at - documents * cuts, documents)


def plain_model(args: Llama3Args) -> Decoder:
    """The model as it is, with the values that every layout starts from."""
    model = Decoder(args)
    initialize(model, model.inits(), seed=3)
    return model


def plain(args: Llama3Args) -> Result:
    """The reference: the model as it is, the loss as PyTorch has it."""
    model, batch = plain_model(args), rows(args.vocab_size)
    logits = model.output(model(batch.tokens, batch.positions, batch.document_ids))
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(loss.item(), torch.stack([g.norm() for g in found.values()]).norm().item(), found)


def step(args: Llama3Args, degrees: Degrees, job: JobConfig, dtype: torch.dtype) -> Result:
    """One step, a row at a time, each rank on its own rows."""
    dims = ParallelDims.build(degrees, "cpu")
    model: Any = build_stages(load(), args, job, dims, torch.device("cpu"), dtype, seed=3)[0].module
    loss, batch = build_default_loss(job), rows(args.vocab_size)
    valid, total = (batch.labels != IGNORE).sum(), 0.0
    for row in range(dims.data_rank, ROWS, dims.data_degree):
        piece = split_sequence(batch.slice(row, row + 1), dims.axis("cp"), job.parallelism)
        hidden = model(piece.tokens, piece.positions, piece.document_ids)
        found = loss(hidden, model.output, piece)
        (found.sums.sum() / valid).backward()
        total += (found.sums.sum() / valid).item()
    return Result(total, gradient_norm(model.parameters()).item(), whole_gradients(model))


CHUNKED = JobConfig(loss=Loss(name="chunked_cross_entropy", chunk_tokens=5))
GATHERED = Parallelism(disable_loss_parallel=True)
BY_OP = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="selective", selective_ac_option="op"))
OFFLOAD = JobConfig(training=Training(enable_cpu_offload=True))
COMPILED = JobConfig(compile=Compile(enable=True, backend="aot_eager"))
NONE, FULL = ActivationCheckpoint(mode="none"), ActivationCheckpoint(mode="full")
INDUCTOR = Compile(enable=True, backend="inductor")
ULYSSES = JobConfig(parallelism=Parallelism(context_parallel_degree=2, context_parallel_rotate_method="ulysses"))
FSDP_TP = Degrees(dp_shard=2, tp=2)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("args", "degrees", "job"),
    [
        pytest.param(ARGS, Degrees(tp=2), JobConfig(), id="tp 2"),
        pytest.param(THREE, Degrees(tp=3), JobConfig(), id="tp 3, nothing divides"),
        pytest.param(ARGS, Degrees(tp=4), JobConfig(), id="tp 4, two kv heads"),
        pytest.param(ONE_KV, Degrees(tp=4), JobConfig(), id="tp 4, one kv head"),
        pytest.param(NARROW, Degrees(tp=4), JobConfig(), id="tp 4, fewer pieces than ranks"),
        pytest.param(replace(NARROW, tied_embeddings=True), Degrees(tp=4), CHUNKED, id="tp 4, the same, tied, chunked"),
        pytest.param(ARGS, FSDP_TP, JobConfig(), id="fsdp 2, tp 2"),
        pytest.param(TIED, Degrees(tp=2), JobConfig(), id="tp 2, tied"),
        pytest.param(TIED, Degrees(dp_replicate=2, tp=2), CHUNKED, id="ddp 2, tp 2, tied, chunked"),
        pytest.param(THREE, Degrees(tp=3), JobConfig(parallelism=GATHERED), id="tp 3, logits gathered"),
        pytest.param(ONE_KV, Degrees(tp=4), replace(CHUNKED, parallelism=GATHERED), id="tp 4, chunked, gathered"),
        pytest.param(ARGS, FSDP_TP, BY_OP, id="fsdp 2, tp 2, recompute by op"),
        pytest.param(ARGS, FSDP_TP, OFFLOAD, id="fsdp 2, tp 2, offloaded"),
        pytest.param(THREE, Degrees(tp=3), COMPILED, id="tp 3, compiled", marks=slow),
        pytest.param(TIED, FSDP_TP, replace(COMPILED, activation_checkpoint=NONE), id="compiled, none", marks=slow),
        pytest.param(ARGS, FSDP_TP, replace(COMPILED, activation_checkpoint=FULL), id="compiled, full", marks=slow),
        pytest.param(ARGS, FSDP_TP, replace(BY_OP, compile=COMPILED.compile), id="compiled, by op", marks=slow),
        pytest.param(ONE_KV, Degrees(tp=4), replace(CHUNKED, compile=INDUCTOR), id="inductor, chunked", marks=slow),
    ],
)
def test_every_gradient_is_the_plain_models(args: Llama3Args, degrees: Degrees, job: JobConfig) -> None:
    want = plain(args)
    results: list[Result] = run_ranks(degrees.world, step, args, degrees, job, torch.float32, timeout=300)
    assert sum(r.loss for r in results) / degrees.tp == pytest.approx(want.loss, rel=1e-6)
    for found in results:
        assert found.norm == pytest.approx(want.norm, rel=1e-5)
        assert found.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            error = (found.gradients[name] - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm(), 1e-3 * want.norm), name


def step_of_kind(args: KindArgs, degrees: Degrees, job: JobConfig) -> Result:
    """As `step`, from values none of which is 0."""
    with patch.object(Attention, "inits", drawn):
        return step(args, degrees, job, torch.float32)


@pytest.mark.parametrize(
    ("args", "degrees", "job"),
    [
        pytest.param(of_kind(ARGS, "sinks"), Degrees(tp=2), JobConfig(), id="sinks, tp 2", marks=slow),
        pytest.param(of_kind(ARGS, "sinks"), FSDP_TP, BY_OP, id="sinks, fsdp 2, tp 2, recompute by op"),
        pytest.param(
            of_kind(THREE, "sinks"), Degrees(dp_replicate=2, tp=3), JobConfig(), id="sinks, ddp 2, tp 3", marks=slow
        ),
        pytest.param(of_kind(ARGS, "sinks"), Degrees(cp=2, tp=2), ULYSSES, id="sinks, ulysses 2, tp 2"),
        pytest.param(of_kind(ARGS, "sinks"), FSDP_TP, COMPILED, id="sinks, compiled", marks=slow),
        pytest.param(of_kind(ARGS, "scale"), Degrees(tp=2), JobConfig(), id="biases, tp 2", marks=slow),
        pytest.param(of_kind(ONE_KV, "scale"), Degrees(tp=4), JobConfig(), id="biases, tp 4, one kv head"),
        pytest.param(of_kind(ARGS, "reach"), Degrees(tp=2), JobConfig(), id="windows and chunks, tp 2", marks=slow),
    ],
)
def test_every_gradient_of_other_kinds_of_attention(args: KindArgs, degrees: Degrees, job: JobConfig) -> None:
    with patch.object(Attention, "inits", drawn):
        want = plain(args)
    for found in run_ranks(degrees.world, step_of_kind, args, degrees, job, timeout=300):
        assert found.norm == pytest.approx(want.norm, rel=1e-5)
        assert found.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            error = (found.gradients[name] - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm(), 1e-3 * want.norm), name


def in_one_process(args: KindArgs, job: JobConfig) -> dict[str, Tensor]:
    """The gradients, with all four ranks in this process."""
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode  # no public name yet
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    with patch.object(Attention, "inits", drawn):
        model: Any = plain_model(args)  # outside of the mode, in which each rank would draw its own numbers
    batch = rows(args.vocab_size)
    valid = (batch.labels != IGNORE).sum()
    with LocalTensorMode(4):
        dims = ParallelDims.build(Degrees(cp=2, tp=2), "cpu")
        parallelize_decoder(model, dims, job, torch.float32)
        piece = split_sequence(batch, dims.axis("cp"), job.parallelism)
        logits = model.output(model(piece.tokens, piece.positions, piece.document_ids)).flatten(0, 1)
        loss = F.cross_entropy(logits, piece.labels.flatten(), ignore_index=IGNORE, reduction="sum") / valid
        loss.backward()
        whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        return {name: g.reconcile() if isinstance(g, LocalTensor) else g for name, g in whole.items()}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("sinks", "ulysses"),
        pytest.param("sinks", "allgather", marks=slow),
        pytest.param("scale", "ulysses", marks=slow),
    ],
)
def test_other_kinds_of_attention_with_all_ranks_in_one_process(kind: str, method: Any) -> None:
    args = of_kind(replace(ARGS, vocab_size=52), kind)
    config = Parallelism(
        tensor_parallel_degree=2,
        context_parallel_degree=2,
        context_parallel_rotate_method=method,
        disable_loss_parallel=True,
    )
    job = JobConfig(comm=Comm(mode="local_tensor"), parallelism=config)
    with patch.object(Attention, "inits", drawn):
        want = plain(args)
    found = run_ranks(1, in_one_process, args, job, backend=None)[0]
    assert found.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * want.norm), name


def test_bf16_stays_close() -> None:
    want = plain(ARGS)
    for found in run_ranks(4, step, ARGS, FSDP_TP, JobConfig(), torch.bfloat16):
        assert found.norm == pytest.approx(want.norm, rel=2e-2)
        for name, gradient in want.gradients.items():
            error = (found.gradients[name] - gradient).norm()
            assert 0 < error <= 3e-2 * max(gradient.norm(), 1e-1 * want.norm), name


def values(args: Llama3Args, degrees: Degrees) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Initial parameters, and the shapes that they are known by."""
    dims = ParallelDims.build(degrees, "cpu")
    stage, *_ = build_stages(load(), args, JobConfig(), dims, torch.device("cpu"), torch.float32, seed=3)
    named = dict(stage.module.named_parameters())
    return {name: whole(p) for name, p in named.items()}, {name: tuple(p.shape) for name, p in named.items()}


@pytest.mark.parametrize("degrees", [Degrees(dp_shard=2, tp=3), Degrees(dp_replicate=2, tp=3), Degrees(tp=3)])
def test_shapes_and_initial_values_do_not_depend_on_the_layout(degrees: Degrees) -> None:
    want = dict(plain_model(THREE).named_parameters())
    for found, shapes in run_ranks(degrees.world, values, THREE, degrees):
        assert shapes == {name: tuple(p.shape) for name, p in want.items()}
        for name, value in want.items():
            assert torch.equal(found[name], value), name


def compilations() -> dict[str, int]:
    """What a step of a model of four blocks compiles."""
    from torch._dynamo.utils import counters

    step(replace(ARGS, n_layers=4), Degrees(tp=2), replace(COMPILED, activation_checkpoint=NONE), torch.float32)
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def test_equal_blocks_share_one_artifact_and_the_loss_is_another() -> None:
    assert run_ranks(2, compilations, timeout=120) == [{"graphs": 2, "breaks": 0}] * 2


def refusals() -> list[str]:
    """What a plan or sizes that do not fit are told."""
    dims, texts = ParallelDims.build(Degrees(tp=2), "cpu"), []
    plan = decoder_plan(ARGS)
    without = {name: style for name, style in plan.tensor.items() if not name.endswith("norm")}
    for args, broken in (
        (THREE, decoder_plan(THREE)),
        (SIX, decoder_plan(SIX)),
        (replace(ARGS, n_layers=1), replace(plan, tensor=without)),
        (ARGS, replace(plan, tensor={**plan.tensor, "layers.*.attention_norm": Columns()})),
        (ARGS, replace(plan, embedding="norm")),
    ):
        with torch.device("meta"), pytest.raises(MeshError) as error:
            tensor(Decoder(args), broken, dims, JobConfig())
        texts.append(str(error.value))
    return texts


def test_what_cannot_be_cut_is_named() -> None:
    degree = "parallelism.tensor_parallel_degree = 2"
    expected = [
        f"{degree}: layers.0.attention.wq has 24 output features in units of 8, and 3 neither is a multiple of 2 nor"
        " divides it",
        f"{degree}: layers.0.attention.wk has 12 output features in units of 4, and 3 neither is a multiple of 2 nor"
        " divides it",
        "the plan's `tensor` says nothing of layers.0.attention_norm.weight, layers.0.ffn_norm.weight, norm.weight:"
        " give the module a style",
        "the plan cuts layers.0.attention_norm like a linear layer, but it is a RMSNorm",
        "the embedding norm is a RMSNorm: only nn.Embedding can be cut",
    ]
    assert run_ranks(2, refusals) == [expected] * 2
