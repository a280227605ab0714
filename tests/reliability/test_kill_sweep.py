"""Jobs that are killed at random moments of steps, saves, renames and deletions come back: nothing lost, no other
numbers, no checkpoint that cannot be loaded."""

from pathlib import Path

import pytest

from tests.reliability.harness_figures import record
from tests.reliability.harness_groups import kill_groups, whole
from tests.reliability.harness_sweep import distribution, sweep

MODES = ("disabled", "async")
HELD = "0 latest checkpoints that do not load, 0 silent fallbacks, losses and weights bit for bit"


def check(where: dict[str, int], kills: int) -> None:
    assert sum(where.values()) == kills
    assert 3 * (where["write"] + where["rename"] + where["delete"]) >= kills, where


def test_25_kills(tmp_path: Path) -> None:
    check(distribution(sweep(tmp_path, 25, MODES, seed=4)), 25)


@pytest.mark.slow
def test_190_kills(tmp_path: Path) -> None:
    where = distribution(sweep(tmp_path, 190, MODES, seed=40))
    check(where, 190)
    windows = ", ".join(f"{count} in {phase}" for phase, count in where.items() if phase != "other")
    record("kills", f"190 kills ({windows}, {where['other']} elsewhere): {HELD}")


@pytest.mark.slow
def test_10_kills_of_whole_process_groups(tmp_path: Path) -> None:
    reference, kills, number = whole(tmp_path / "whole"), 0, 0
    while kills < 10:
        kills += kill_groups(tmp_path / str(number), reference, 10 - kills, seed=number)
        number += 1
    record("killed groups", f"10 process groups of run_train.sh on two ranks: {HELD}, no rank goes on")
