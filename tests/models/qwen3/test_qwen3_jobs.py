"""Whole jobs with experts: the numbers of one rank on others, and checkpoints that go from layout to layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import facts, train

TINY = (
    "--experimental.custom_import=tests.models.qwen3.tiny",
    "--model.name=tiny_qwen3",
    "--model.flavor=moe",
    "--data.document_mask",
)
COMMON = (
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=24",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=4",
    "--validation.steps=2",
    "--validation.freq=3",
)
EXPERT, TENSOR = "--parallelism.expert_parallel_degree", "--parallelism.tensor_parallel_degree"
EXPERT_TENSOR, REPLICATE = (
    "--parallelism.expert_tensor_parallel_degree",
    "--parallelism.data_parallel_replicate_degree",
)
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ep 2, recomputed": (2, (f"{EXPERT}=2", "--activation_checkpoint.mode=full")),
    "tp 2 as ep 2": (2, (f"{TENSOR}=2", f"{EXPERT}=2", "--training.local_batch_size=3")),
    "pp 2": (2, ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")),
}
MORE: dict[str, tuple[int, tuple[str, ...]]] = {
    "cp 2, ep 2": (2, ("--parallelism.context_parallel_degree=2", f"{EXPERT}=2")),
    "hsdp 2 x tp 2, etp 2": (4, (f"{REPLICATE}=2", f"{TENSOR}=2", f"{EXPERT_TENSOR}=2")),
    "ep 2, compiled and recomputed": (2, (f"{EXPERT}=2", *COMPILED, "--activation_checkpoint.mode=full")),
    "tp 2, ep 2, compiled": (2, (f"{TENSOR}=2", f"{EXPERT}=2", *COMPILED)),
    "ep 2, offloaded": (2, (f"{EXPERT}=2", "--training.enable_cpu_offload")),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(1, tmp_path_factory.mktemp("reference"), *TINY, *COMMON, "--training.local_batch_size=4")


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_layout_gives_the_same_numbers(name: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = (LAYOUTS | MORE)[name]
    found = train(ranks, tmp_path, *TINY, *COMMON, *arguments)
    for mine, theirs in zip(found, reference, strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]
    assert found[-1]["validation_loss"] == pytest.approx(reference[-1]["validation_loss"], rel=1e-5)


def test_bfloat16_stays_close(reference: list[dict[str, Any]], tmp_path: Path) -> None:
    low = ("--training.mixed_precision_param=bfloat16",)
    one = train(1, tmp_path / "one", *TINY, *low)
    two = train(2, tmp_path / "two", *TINY, *low, f"{EXPERT}=2")
    for exact, a, b in zip(reference, one, two, strict=True):
        assert a["loss"] != exact["loss"]
        assert a["loss"] == pytest.approx(exact["loss"], rel=5e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, (f"{EXPERT}=2",)), (1, ())), ((1, ()), (4, (f"{EXPERT}=2", f"{TENSOR}=2", f"{EXPERT_TENSOR}=2")))],
    ids=["from ep 2 to one rank", "from one rank to ep 2, etp 2"],
)
def test_a_checkpoint_goes_to_another_layout(
    before: tuple[int, tuple[str, ...]], after: tuple[int, tuple[str, ...]], reference: Any, tmp_path: Path
) -> None:
    """Weights, the optimizer's state and selection biases of experts, which decide the third step."""
    saves = (*TINY, "--checkpoint.enable", "--checkpoint.interval=2")
    train(before[0], tmp_path, *saves, *before[1], "--training.steps=2")
    resumed = train(after[0], tmp_path, *saves, *after[1])
    assert [record["step"] for record in resumed] == [1, 2, 3]
    assert facts(resumed[-1]) == pytest.approx(facts(reference[-1]), rel=1e-5)
    index = (tmp_path / "checkpoint/step-2").rglob("tensors.json")
    assert '"model.layers.1.moe.expert_bias"' in next(index).read_text()
