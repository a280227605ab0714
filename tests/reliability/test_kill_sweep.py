"""Jobs that are killed at random moments of steps, saves, renames and deletions come back: nothing lost, no other
numbers, no checkpoint that cannot be loaded."""

from pathlib import Path

from tests.reliability.harness_sweep import distribution, sweep

MODES = ("disabled",)


def test_25_kills(tmp_path: Path) -> None:
    where = distribution(sweep(tmp_path, 25, MODES, seed=4))
    assert sum(where.values()) == 25
    assert where["write"] + where["rename"] + where["delete"] >= 9, where
