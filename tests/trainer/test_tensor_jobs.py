"""Whole jobs under tensor parallelism give the numbers of one rank, also after a change of layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import facts, train

TENSOR, SHARD = "--parallelism.tensor_parallel_degree", "--parallelism.data_parallel_shard_degree"
COMMON = (
    "--data.document_mask",
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=18",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=4",
    "--validation.steps=2",
    "--validation.freq=2",
)
LAYOUTS = {
    "tensor 3": (3, (f"{TENSOR}=3", "--training.local_batch_size=6")),
    "tensor 3, FSDP 2, chunked loss": (
        6,
        (f"{TENSOR}=3", "--training.local_batch_size=3", "--loss.name=chunked_cross_entropy", "--loss.chunk_tokens=7"),
    ),
}
SAVING = ("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.last_save_model_only=false")


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)
        assert mine.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four steps on one rank."""
    return train(
        1, tmp_path_factory.mktemp("reference"), *COMMON, "--training.steps=4", "--training.local_batch_size=4"
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_numbers_are_those_of_one_rank(name: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    same(train(ranks, tmp_path, *COMMON, "--training.steps=4", *arguments), reference)


def test_one_layout_goes_on_where_another_stopped(reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of 2048 entries of the vocabulary and 40 hidden features, three ranks have one more or less than the others."""
    first = train(6, tmp_path, *COMMON, *SAVING, "--training.steps=2", f"{TENSOR}=3", f"{SHARD}=2")
    same(first, reference[:2])
    rest = train(1, tmp_path, *COMMON, *SAVING, "--training.steps=4")
    same(rest[-2:], reference[2:])
