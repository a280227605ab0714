"""Whole jobs whose ranks share sequences: the numbers are those of one rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import facts, train

COMMON = (
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=36",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=4",
    "--validation.steps=3",
    "--validation.freq=2",
)
DOCUMENTS = (*COMMON, "--data.document_mask")
CONTEXT = "--parallelism.context_parallel_degree"
BALANCER = "--parallelism.context_parallel_load_balancer"
METHOD = "--parallelism.context_parallel_rotate_method"
LAYOUTS = {
    "gathered": (2, (f"{CONTEXT}=2",)),
    "ring": (2, (f"{CONTEXT}=2", f"{METHOD}=alltoall", "--training.local_batch_size=3")),
    "ring of three": (3, (f"{CONTEXT}=3", f"{METHOD}=alltoall")),
    "ulysses": (3, (f"{CONTEXT}=3", f"{METHOD}=ulysses", f"{BALANCER}=none")),
    "nothing balanced, beside data": (
        4,
        (f"{CONTEXT}=2", f"{BALANCER}=", "--parallelism.data_parallel_shard_degree=2"),
    ),
    "recomputed": (2, (f"{CONTEXT}=2", f"{METHOD}=alltoall", "--activation_checkpoint.mode=full")),
}
FAST = ("ring", "ulysses", "nothing balanced, beside data")


def same(found: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [1, 2, 3]
    for mine, theirs in zip(found, reference, strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]
        assert mine.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-5)
    assert "validation_loss" in found[1]


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(1, tmp_path_factory.mktemp("within"), *DOCUMENTS, "--training.local_batch_size=4")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_jobs_give_the_same_numbers(name: str, within: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    same(train(ranks, tmp_path, *DOCUMENTS, *arguments), within)


@pytest.mark.slow
def test_rows_without_documents(tmp_path: Path) -> None:
    reference = train(1, tmp_path / "one", *COMMON, "--training.local_batch_size=4")
    for method in ("allgather", "alltoall"):
        same(train(2, tmp_path / method, *COMMON, f"{CONTEXT}=2", f"{METHOD}={method}"), reference)


@pytest.mark.slow
def test_bf16_stays_close(tmp_path: Path) -> None:
    low = ("--training.mixed_precision_param=bfloat16", "--data.document_mask")
    reference = train(1, tmp_path / "one", *low)
    for method in ("allgather", "alltoall", "ulysses"):
        ranks = 3 if method == "ulysses" else 2
        found = train(ranks, tmp_path / method, *low, f"{CONTEXT}={ranks}", f"{METHOD}={method}")
        for mine, theirs in zip(found, reference, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
            assert mine["tokens"] == theirs["tokens"]


@pytest.mark.slow
def test_compiled_jobs(tmp_path: Path) -> None:
    compiled = ("--compile.enable", "--compile.backend=aot_eager", "--data.document_mask")
    reference = train(1, tmp_path / "one", "--data.document_mask")
    found = train(2, tmp_path / "two", *compiled, f"{CONTEXT}=2", f"{METHOD}=alltoall")
    assert [facts(record) for record in found] == [pytest.approx(facts(record), rel=1e-5) for record in reference]
