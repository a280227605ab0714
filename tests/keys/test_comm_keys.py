"""What `[comm]` does to the groups that checkpoints are agreed on over."""

from pathlib import Path

import pytest

from tests.trainer.runs import launch

LATE = (
    "--experimental.custom_import=tests.keys.late_saves",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--training.steps=2",
    "--training.local_batch_size=6",
    "--comm.train_timeout_seconds=1",
)


@pytest.mark.shows("comm.checkpoint_timeout_seconds")
@pytest.mark.parametrize("seconds", [1, 1800])
def test_a_save_may_take_longer_than_a_step(seconds: int, tmp_path: Path) -> None:
    """One rank is two seconds late to the save of the last step."""
    outcomes = launch(2, tmp_path, *LATE, f"--comm.checkpoint_timeout_seconds={seconds}")
    saved = (tmp_path / "checkpoint/step-2/manifest.json").exists()
    assert ([outcome.code for outcome in outcomes] == [0, 0], saved) == (seconds > 2, seconds > 2), outcomes[0].stderr
