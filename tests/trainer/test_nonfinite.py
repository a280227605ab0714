"""A loss that is not finite is found before the optimizer step, on all ranks alike, and its rank is named."""

import json
from pathlib import Path

import pytest

from tests.trainer.runs import launch, records

BROKEN = (
    "--experimental.custom_import=tests.trainer.broken_losses",
    "--loss.name=nan_on_rank_one",
    "--training.local_batch_size=6",
    "--training.steps=3",
    "--checkpoint.enable",
    "--checkpoint.interval=1",
)
WHERE = (
    "step 2: loss nan, gradient norm nan (rank 0: gradient of tok_embeddings.weight; rank 1: loss, gradient of"
    " tok_embeddings.weight)"
)


def test_stop_ends_before_the_step_on_all_ranks(tmp_path: Path) -> None:
    outcomes = launch(2, tmp_path, *BROKEN)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    message = f"error: not finite before the optimizer step, weights are unchanged: {WHERE}"
    assert [outcome.stderr.splitlines()[-1] for outcome in outcomes] == [message, message]
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-1"]


def test_skip_leaves_the_weights_and_goes_on(tmp_path: Path) -> None:
    outcomes = launch(2, tmp_path, *BROKEN, "--training.on_nonfinite=skip")
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert f"[rank 0] warning: skipped, weights are unchanged: {WHERE}" in outcomes[0].stderr
    assert "skipped" not in outcomes[1].stderr
    found = records(tmp_path)
    assert [record["loss"] is None for record in found] == [False, True, False]
    assert found[1]["nonfinite"] == {"loss": "nan", "max_loss": "nan", "grad_norm": "nan"}
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in events if event.get("event", "saved") != "saved"] == [
        {
            "event": "skipped_step",
            "step": 2,
            "kind": "nonfinite",
            "policy": "skip",
            "loss": None,
            "grad_norm": None,
            "median_loss": None,
            "median_grad_norm": None,
            "reason": WHERE,
            "nonfinite": {"loss": "nan", "grad_norm": "nan"},
        }
    ]
    assert found[1]["tokens"] == found[0]["tokens"]  # none that it was trained on
    first, second = ((tmp_path / f"checkpoint/step-{step}/__0_0.distcp").read_bytes() for step in (1, 2))
    assert first == second


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_exploding_run_stops_by_itself(ranks: int, tmp_path: Path) -> None:
    outcomes = launch(ranks, tmp_path, "--optimizer.lr=1e38", "--training.steps=9")
    assert {outcome.code for outcome in outcomes} == {1}
    assert "not finite before the optimizer step, weights are unchanged: step 2" in outcomes[0].stderr
