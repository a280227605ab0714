"""Jobs give the same numbers in every layout that they can have; what they cannot have is refused at the start."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from components.config.job_config import JobConfig
from components.mesh.batch import Batch
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from experiments.transformers_backend.args import Folders
from experiments.transformers_backend.spec import load
from tests.experiments.transformers_backend.jobs import refused, train
from tests.experiments.transformers_backend.small import folder
from tests.ranks import run_ranks
from tests.trainer.runs import ROOT, call
from tests.whole import whole_gradients
from trainer.build import build_stages
from trainer.config.load import load_job

EVEN = (
    "--training.local_batch_size=2",
    "--parallelism.pipeline_parallel_first_stage_less_layers=0",
    "--parallelism.pipeline_parallel_last_stage_less_layers=0",
)
TENSOR = "--parallelism.tensor_parallel_degree=2"
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", *EVEN)
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")
slow = pytest.mark.slow


def close(found: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    for a, b in zip(found, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@cache
def reference(name: str) -> list[dict[str, float]]:
    """One rank's numbers."""
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        return train(1, Path(path) / "run", folder(Path(path), name, vocab_size=2048))


@pytest.mark.parametrize(
    ("name", "ranks", "arguments"),
    [
        ("llama", 2, ()),
        ("llama", 2, (TENSOR,)),
        ("llama", 2, PIPELINE),
        pytest.param("gemma2", 2, PIPELINE, marks=slow),
        pytest.param("llama", 2, ("--parallelism.data_parallel_replicate_degree=2",), marks=slow),
        pytest.param("llama", 1, ("--activation_checkpoint.mode=full",), marks=slow),
        pytest.param("llama", 2, COMPILED, marks=slow),
        pytest.param("llama", 4, (*PIPELINE, TENSOR, "--activation_checkpoint.mode=selective"), marks=slow),
        pytest.param("qwen3", 2, (TENSOR, *COMPILED), marks=slow),
        pytest.param("mistral", 2, (TENSOR,), marks=slow),
        pytest.param("gemma2", 2, COMPILED, marks=slow),
        pytest.param("qwen3_moe", 2, COMPILED, marks=slow),
        pytest.param("mixtral", 2, PIPELINE, marks=slow),
        pytest.param("gpt2", 2, ("--activation_checkpoint.mode=full",), marks=slow),
        pytest.param("gpt_neox", 2, PIPELINE, marks=slow),
    ],
)
def test_a_job_gives_the_same_numbers_in_every_layout(
    name: str, ranks: int, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    found = train(ranks, tmp_path / "run", folder(tmp_path, name, vocab_size=2048), *arguments)
    close(found, reference(name))


def gradients(flavor: str, tp: int) -> dict[str, Tensor]:
    """Whole gradients of one packed batch."""
    args, spec, job = Folders()[flavor], load(), JobConfig()
    dims = ParallelDims.build(Degrees(tp=tp), "cpu")
    (stage,) = build_stages(spec, args, job, dims, torch.device("cpu"), torch.float32, 3)
    model: Any = stage.module
    tokens = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 7 + [1] * 9, [0] * 3 + [1] * 13])
    positions = torch.cat([torch.arange(7), torch.arange(9), torch.arange(3), torch.arange(13)]).view(2, 16)
    hidden = model(tokens, positions=positions, document_ids=documents)
    batch = Batch(tokens, tokens.roll(-1, 1), positions, documents)
    spec.build_loss_fn(job)(hidden, model.output, batch).sums.sum().backward()
    return whole_gradients(model)


def cut(flavor: str) -> dict[str, Tensor]:
    found = gradients(flavor, dist.get_world_size())
    return found if dist.get_rank() == 0 else {}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen2", {"vocab_size": 69, "intermediate_size": 45}),
        pytest.param("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, marks=slow),
        pytest.param("qwen3", {"final_logit_softcapping": 2.0}, marks=slow),
        pytest.param("mistral", {}, marks=slow),
        pytest.param("olmo", {"base_model_tp_plan": None}, marks=slow),
        pytest.param("cohere", {}, marks=slow),
    ],
)
def test_gradients_are_the_same_under_tensor_parallelism(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    flavor = folder(tmp_path, name, **fields)
    (found, _), want = run_ranks(2, cut, flavor), gradients(flavor, 1)
    assert {*found} == {*want}
    for key, gradient in want.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, key


def test_a_layout_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    error = refused(2, tmp_path / "run", folder(tmp_path, "gemma2", vocab_size=2048), TENSOR)
    why = "model.embed_tokens is a Gemma2TextScaledWordEmbedding, which does more than to look up; set it to 1"
    assert f"error: --parallelism.tensor_parallel_degree=2: {why}" in error


CONFIG = ROOT / "experiments/transformers_backend/train_configs/debug_model.toml"


def test_the_debug_model_is_what_it_says() -> None:
    environ = {"NGPU": "4"}
    argv = [f"--job.config_file={CONFIG}", "--comm.mode=fake_backend", "--training.dataset_path=/nowhere", TENSOR]
    (outcome,) = run_ranks(1, call, argv, environ, backend=None)
    assert outcome.code == 0, outcome.stderr
    job = load_job([f"--job.config_file={CONFIG}"], {}).job
    assert f"model: transformers {job.model.flavor}, 6,163,712 parameters" in outcome.stdout
    assert re.search(r"layout: 4 ranks, .*2 tensor", outcome.stdout)
