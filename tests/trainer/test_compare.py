"""`debug.compare_ranks`: a replica that computed something else is named, and a healthy run is said to be so."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, meeting_point
from trainer.compare import Disagreement, Numbers, Piece, compare, numbers_of

WRONG, TURNED, DRIFTED = "layers.1.attention.wo.weight", "layers.0.feed_forward.w2.weight", "norm.weight"


def run(argv: list[str], environ: dict[str, str]) -> list[str]:
    """A job whose last rank computes wrong gradients in step 2; names of its parameters."""
    os.environ.update(environ)
    from components.mesh.batch import Batch, RowLoss
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    class Wrong(Trainer):
        def accumulate(self, batch: Batch) -> tuple[RowLoss, Tensor]:
            result = super().accumulate(batch)
            if self.progress.step == 2 and self.world.rank == self.world.size - 1:
                model = self.models[0]
                for name, factor in ((WRONG, 1.25), (TURNED, -1.0)):
                    local(model.get_parameter(name).grad).mul_(factor)
                local(model.get_parameter(DRIFTED).detach()).add_(0.5)
            return result

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Wrong(resolved, os.environ)
    trainer.train()
    trainer.close()
    return [name for name, _ in trainer.models[0].named_parameters()]


def local(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to_local() if isinstance(value, DTensor) else value


@pytest.mark.shows("debug.compare_ranks")
def test_the_wrong_replica_is_named(tmp_path: Path) -> None:
    argv = [*TINY, f"--job.dump_folder={tmp_path}", "--training.steps=2", "--debug.compare_ranks=1"]
    argv += ["--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=6"]
    names, *_ = run_ranks(2, run, argv, meeting_point(), backend=None)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    healthy, wrong = [event for event in events if event.get("event") == "compared_ranks"]
    everything = {"shared": len(names), "disagree": []}
    assert (healthy["step"], healthy["gradients"], healthy["weights"]) == (1, everything, everything)
    norms = [event["grad_norm"] for event in events if "event" not in event]
    assert healthy["local_norms"][0] == pytest.approx(norms[0], rel=1e-5)
    assert healthy["local_norms"][0] == healthy["local_norms"][1] != wrong["local_norms"][0] != wrong["local_norms"][1]
    turned, scaled = sorted(wrong["gradients"]["disagree"], key=lambda one: one["parameter"])
    assert (turned["parameter"], turned["ranks"]) == (TURNED, [0, 1])
    assert turned["norms"][0] == turned["norms"][1]
    assert (scaled["parameter"], scaled["ranks"]) == (WRONG, [0, 1])
    assert scaled["norms"][1] == pytest.approx(1.25 * scaled["norms"][0], rel=1e-6)
    assert scaled["difference"] == pytest.approx(0.2, rel=1e-6)
    assert [one["parameter"] for one in wrong["weights"]["disagree"]] == [DRIFTED]


def test_pieces_of_different_places_are_not_compared() -> None:
    held: list[list[dict[Piece, Numbers]]] = [
        [{("w", (0,)): (1.0, 0.5)}],
        [{("w", (1,)): (2.0, 0.5)}],
        [{("w", (0,)): (1.0, 0.5)}],
        [{("w", (1,)): (4.0, 0.5)}],
    ]
    assert compare(held) == (2, [Disagreement("w", [1, 3], [2.0, 4.0], 0.5)])


def test_what_is_no_number_disagrees_and_order_counts() -> None:
    (found,) = compare([[{("w", ()): (1.0, 0.0)}], [{("w", ()): (math.nan, 0.0)}]])[1]
    assert (found.ranks, found.difference) == ([0, 1], math.inf)
    values = torch.tensor([3.0, 4.0])
    here, there = numbers_of([("w", values)]), numbers_of([("w", values.flip(0))])
    assert here["w", ()][0] == there["w", ()][0] == 5.0
    assert [one.parameter for one in compare([[here], [there]])[1]] == ["w"]
    assert [(one.parameter, one.ranks) for one in compare([[here, there]])[1]] == [("w", [0, 0])]  # stages of one rank
