"""Whole jobs through the entry point, on a real corpus: how streams are dealt to ranks and workers changes no number
that is reported. What a layout computes is the matrix's business (`tests/layouts`).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import facts, train

STEPS = 10
SHARD, REPLICATE = "--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"
LAYOUTS = {
    "one rank, no accumulation": (1, ("--training.local_batch_size=12",)),
    "DDP 2": (2, (f"{REPLICATE}=2", "--training.local_batch_size=3")),
    "HSDP 2 x 2, workers": (4, (f"{REPLICATE}=2", f"{SHARD}=2", "--training.dataloader.num_workers=2")),
}
COMMON = (
    f"--training.steps={STEPS}",
    "--data.document_mask",
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=20",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=4",
    "--validation.steps=3",
    "--validation.freq=5",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(1, tmp_path_factory.mktemp("reference"), *COMMON, "--training.local_batch_size=4")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_numbers(name: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    found = train(ranks, tmp_path, *COMMON, *arguments)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for mine, theirs in zip(found, reference, strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]
        assert mine.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-5)
    assert "validation_loss" in found[4]
    assert "validation_loss" in found[9]
    assert 12 * 24 * STEPS * 0.8 < found[-1]["tokens"] < 12 * 24 * STEPS  # borders between documents are not counted


def test_groups_of_parameters_that_a_pipeline_stage_has_none_of(tmp_path: Path) -> None:
    groups = "--optimizer.parameter_groups=[{pattern='^output', lr_factor=5.0}, {pattern='embed', weight_decay=9.0}]"
    common = ("--model.flavor=deep", "--training.local_batch_size=4", "--optimizer.lr=1e-2", groups)
    want = train(1, tmp_path / "one", *common)
    found = train(2, tmp_path / "two", *common, "--parallelism.pipeline_parallel_degree=2")
    assert [facts(record) for record in found] == [pytest.approx(facts(record), rel=1e-5) for record in want]
    plain = train(1, tmp_path / "plain", *common[:-1])
    assert facts(plain[-1])["loss"] != pytest.approx(facts(want[-1])["loss"], rel=1e-3)
