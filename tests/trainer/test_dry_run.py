"""The dry run counts what a real run would hold, on any number of ranks, without a GPU, data or a tokenizer."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from models.deepseek_v3.args import FLAVORS as DEEPSEEK_V3
from models.train_spec import get_args
from tests.ranks import run_ranks
from tests.trainer.runs import ROOT, TINY, Outcome, call, meeting_point
from trainer.config.load import load_job

NO_DATA = ("--comm.mode=fake_backend", "--training.dataset_path=/nowhere", "--model.hf_assets_path=/nowhere")


def dry_run(ranks: int, *arguments: str, timeout: float = 100) -> str:
    environ = {"NGPU": str(ranks)}
    (outcome,) = run_ranks(1, call, [*arguments, *NO_DATA], environ, backend=None, timeout=timeout)
    assert isinstance(outcome, Outcome)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


def refused(ranks: int, *arguments: str) -> str:
    (outcome,) = run_ranks(1, call, [*arguments, *NO_DATA], {"NGPU": str(ranks)}, backend=None)
    assert (outcome.code, outcome.stdout) == (2, "")
    return outcome.stderr


def held(text: str) -> dict[str, tuple[int, int]]:
    """Elements and bytes by kind."""
    rows = re.findall(r"^  (\w+) +([\d,]+) +([\d,]+) bytes", text, re.MULTILINE)
    return {kind: (int(count.replace(",", "")), int(size.replace(",", ""))) for kind, count, size in rows}


def really_held(argv: list[str], environ: dict[str, str]) -> dict[str, tuple[int, int]]:
    """The same of a real run, counted on this rank after a step."""
    import os

    os.environ.update(environ)
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Trainer(resolved, os.environ)
    rows, _ = next(trainer.steps())
    trainer.accumulate(rows.batch)
    kinds = {
        "parameters": list(trainer.parameters),
        "gradients": [p.grad for p in trainer.parameters if p.grad is not None],
        "optimizer": list(trainer.optimizers.named_state().values()),
    }
    return {kind: (sum(local(t).numel() for t in ts), sum(local(t).nbytes for t in ts)) for kind, ts in kinds.items()}


@pytest.mark.parametrize(
    "arguments",
    [(), ("--parallelism.data_parallel_replicate_degree=2",), ("--training.dtype=bfloat16", "--model.flavor=tied")],
    ids=["FSDP", "HSDP", "bf16, tied"],
)
def test_it_counts_what_a_real_run_holds(arguments: tuple[str, ...], tmp_path: Path) -> None:
    exact = (*TINY, "--training.mixed_precision_param=float32", *arguments)
    counted = held(dry_run(4, *exact))
    environ = meeting_point()
    real = run_ranks(4, really_held, [*exact, f"--job.dump_folder={tmp_path}"], environ, backend=None)
    assert {kind: counted[kind] for kind in real[0]} == real[0]
    assert real[0]["parameters"][0] >= max(rank["parameters"][0] for rank in real)  # rank 0 is the fullest


def test_it_counts_the_jobs_modules_of_multi_token_prediction() -> None:
    deepseek = ("--model.name=deepseek_v3", "--training.seq_len=64", "--training.local_batch_size=1")
    for layers in (0, 2):
        args = replace(DEEPSEEK_V3["debugmodel"], mtp_layers=layers)
        text = dry_run(1, *deepseek, f"--model.mtp_layers={layers}")
        assert f"model: deepseek_v3 debugmodel, {args.parameter_count():,} parameters" in text
        assert held(text)["parameters"][0] == args.parameter_count()
        assert f"{args.flops_per_token(64) * 64:.3e} FLOPs" in text


@pytest.mark.shows("comm.fake_rank")
def test_a_rank_holds_its_own_share() -> None:
    """24 rows of most matrices fall to 5 ranks as 5, 5, 5, 5, 4."""
    tiny = (*TINY, "--training.global_batch_size=5")
    texts = [dry_run(5, *tiny, f"--comm.fake_rank={rank}") for rank in (0, 3, 4)]
    first, fourth, last = (held(text)["parameters"][0] for text in texts)
    assert first == fourth > last
    assert "dry run: one step of rank 4 of 5 in " in texts[2]
    problem = "--comm.fake_rank=5: there are 5 ranks, counted from 0; take a lower one"
    assert refused(5, "--comm.fake_rank=5", *tiny) == f"error: {problem}\n"


def test_the_published_8b_on_64_ranks() -> None:
    config = ROOT / "models/llama3/train_configs/llama3_8b.toml"
    text = dry_run(64, f"--job.config_file={config}", "--parallelism.data_parallel_replicate_degree=1")
    assert "model: llama3 8B, 8,030,261,248 parameters" in text
    share = 8_030_261_248 // 64  # every dimension of it divides by 64
    assert held(text)["parameters"] == (share, 4 * share)
    assert held(text)["gradients"] == (share, 4 * share)
    elements, size = held(text)["optimizer"]
    assert 2 * share <= elements < 2 * share + 1000  # two moments, and a step counter for each parameter
    assert size == 4 * elements
    assert math.isclose(get_args("llama3", "8B").flops_per_token(8192), 5.148e10, rel_tol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(ROOT.glob("models/*/train_configs/*.toml")), ids=lambda path: path.stem)
def test_every_shipped_job_can_be_built(config: Path) -> None:
    job = load_job([f"--job.config_file={config}"], {}).job
    args = get_args(job.model.name, job.model.flavor)
    degrees = job.parallelism
    fixed = (degrees.tensor_parallel_degree, degrees.context_parallel_degree, degrees.pipeline_parallel_degree)
    ranks = max(8, math.prod(fixed), degrees.expert_parallel_degree * degrees.pipeline_parallel_degree)
    if job.training.global_batch_size > 0:  # a fixed batch can be dealt to so many ranks only
        ranks = min(ranks, job.training.global_batch_size // job.training.local_batch_size)
    text = dry_run(ranks, f"--job.config_file={config}", timeout=300)
    assert f"{args.parameter_count():,} parameters" in text
    if degrees.pipeline_parallel_degree == 1:
        assert held(text)["parameters"][0] >= args.parameter_count() / ranks
    assert held(text)["gradients"][0] == held(text)["parameters"][0]


MODELS = ROOT / "models"
LARGE = {
    "llama3/train_configs/llama3_405b_4d.toml": (
        16384,
        "layout: 16384 ranks, 1 replicated × 8 sharded × 16 context × 8 tensor × 16 pipeline\n",
        {
            0: "stage: 0 of 16, counted from 0: tok_embeddings, layers 0 to 6\n",
            8191: "stage: 7 of 16, counted from 0: layers 55 to 62\n",
            16383: "stage: 15 of 16, counted from 0: layers 119 to 125, norm, output\n",
        },
    ),
    "qwen3/train_configs/qwen3_235b_a22b.toml": (
        1024,
        "layout: 1024 ranks, 1 replicated × 32 sharded × 4 tensor × 8 pipeline;"
        " experts 4 sharded × 32 expert × 1 expert tensor\n",
        {
            0: "stage: 0 of 8, counted from 0: tok_embeddings, layers 0 to 10\n",
            511: "stage: 3 of 8, counted from 0: layers 35 to 46\n",
            1023: "stage: 7 of 8, counted from 0: layers 83 to 93, norm, output\n",
        },
    ),
}
"""The largest layouts that are shipped: ranks, what is said of them, and of the stages of three of their ranks."""


@pytest.mark.slow
@pytest.mark.parametrize("config", LARGE)
def test_the_largest_layouts(config: str) -> None:
    ranks, layout, stages = LARGE[config]
    job = load_job([f"--job.config_file={MODELS / config}"], {}).job
    share = get_args(job.model.name, job.model.flavor).parameter_count() / ranks
    for rank, stage in stages.items():
        text = dry_run(ranks, f"--job.config_file={MODELS / config}", f"--comm.fake_rank={rank}", timeout=400)
        assert layout in text
        assert stage in text
        assert held(text)["parameters"][0] == held(text)["gradients"][0] == pytest.approx(share, rel=0.12)


def test_stages_of_sixteen_thousand_ranks() -> None:
    """A rank's share is exactly that of its stage's modules: all sizes divide by 8 tensor × 32 sharding ranks."""
    degrees = ["tensor_parallel_degree=8", "context_parallel_degree=16", "pipeline_parallel_degree=2"]
    degrees += ["data_parallel_replicate_degree=32", "data_parallel_shard_degree=2"]
    small = ("--model.name=llama3", "--model.flavor=debugmodel", *(f"--parallelism.{degree}" for degree in degrees))
    small += ("--training.seq_len=256", "--training.local_batch_size=2")
    first, last = (dry_run(16384, *small, f"--comm.fake_rank={rank}") for rank in (0, 16383))
    assert "layout: 16384 ranks, 32 replicated × 2 sharded × 16 context × 8 tensor × 2 pipeline\n" in first
    assert "stage: 0 of 2, counted from 0: tok_embeddings, layers 0 to 2\n" in first
    assert "stage: 1 of 2, counted from 0: layers 3 to 5, norm, output\n" in last
    block, vocabulary, norm = 4 * 256 * 256 + 3 * 256 * 768, 2048 * 256, 256
    shares = (3 * block + vocabulary) // 256 + 3 * 2 * norm // 32, (3 * block + vocabulary) // 256 + 7 * norm // 32
    assert (held(first)["parameters"][0], held(last)["parameters"][0]) == shares


def test_it_refuses_what_a_real_run_would() -> None:
    assert refused(4, *TINY, "--parallelism.data_parallel_shard_degree=3") == (
        "error: --parallelism.data_parallel_shard_degree=3: 1 (replicate) × 3 (shard) × 1 (context) × 1 (tensor) ×"
        " 1 (pipeline) = 3 ranks, but there are 4: set `parallelism.data_parallel_shard_degree` to 4 (or to -1: all"
        " that are left), or start 3 ranks\n"
    )
