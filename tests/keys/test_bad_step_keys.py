"""What the keys on bad steps do. The loss of the third step is twice as large as usual, of the fifth four times."""

import pytest

from tests.keys.jobs import Done, run_jobs
from tests.keys.test_every_key import problems
from trainer.config.inactive import inactive
from trainer.config.load import load_job

shows = pytest.mark.shows
LOSSES = "--experimental.custom_import=tests.trainer.broken_losses"
JUMPING = (LOSSES, "--loss.name=jumping", "--training.steps=5")
SKIP = (*JUMPING, "--training.on_spike=skip", "--training.spike_window=2")
JOBS = {
    "ignore": JUMPING,
    "skip": SKIP,
    "stop": (*SKIP, "--training.on_spike=stop"),
    "window": (*SKIP, "--training.spike_window=3"),
    "loss": (*SKIP, "--training.spike_loss_factor=2.5"),
    "loss off": (*SKIP, "--training.spike_loss_factor=100"),
    "norm": (*SKIP, "--training.spike_loss_factor=100", "--training.spike_grad_norm_factor=1.5"),
    "nonfinite": (
        LOSSES,  # as the others: names are frozen once the first job has started
        "--optimizer.lr=1e38",
        "--training.on_nonfinite=rollback",
        "--checkpoint.enable",
        "--checkpoint.interval=1",
    ),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), JOBS)


def decisions(job: Done) -> list[tuple[str, int, int | None]]:
    return [(e["event"], e["step"], e.get("to_step")) for e in job.events if e["event"] != "saved"]


def skipped(job: Done) -> list[int]:
    assert {event["event"] for event in job.events} <= {"skipped_step"}
    assert len(job.steps) == 5
    return [event["step"] for event in job.events]


@shows("training.on_spike", "training.spike_window", "training.spike_loss_factor", "training.spike_grad_norm_factor")
def test_what_counts_as_a_spike(done: dict[str, Done]) -> None:
    found = {name: skipped(done[name]) for name in ("ignore", "skip", "window", "loss", "loss off", "norm")}
    assert found == {"ignore": [], "skip": [3, 5], "window": [5], "loss": [5], "loss off": [], "norm": [3, 5]}
    assert done["loss off"].column("loss") == done["ignore"].column("loss")
    assert done["norm"].column("loss") == done["skip"].column("loss")
    assert done["skip"].column("loss")[:3] == done["ignore"].column("loss")[:3]
    assert done["skip"].column("loss")[3] != done["ignore"].column("loss")[3]
    assert done["stop"].outcome.code == 1
    assert "error: spike before the optimizer step, weights are unchanged: step 3: loss" in done["stop"].outcome.stderr
    assert [event["event"] for event in done["stop"].events] == ["stopped_bad_step"]


@shows("training.on_nonfinite")
def test_going_back(done: dict[str, Done]) -> None:
    job = done["nonfinite"]
    assert job.outcome.code == 0, job.outcome.stderr
    assert decisions(job) == [
        ("rolled_back", 2, 1),
        ("passed_over", 2, None),
        ("rolled_back", 3, 2),
        ("passed_over", 3, None),
    ]
    assert [step["loss"] is None for step in job.steps] == [False, True, True]


def test_what_going_back_and_factors_need() -> None:
    back = "--training.on_spike=rollback"
    assert problems((back, "--training.on_nonfinite=rollback")) == [
        'training.on_nonfinite = "rollback": there is no checkpoint to go back to while checkpoint.enable is false; set'
        ' that to true, or this to "skip"',
        'training.on_spike = "rollback": there is no checkpoint to go back to while checkpoint.enable is false; set'
        ' that to true, or this to "skip"',
    ]
    assert problems((back, "--checkpoint.enable", "--checkpoint.load_only")) == [
        'training.on_spike = "rollback": there is no checkpoint to go back to while checkpoint.load_only is true; set'
        ' that to false, or this to "skip"',
    ]
    assert problems((back, "--checkpoint.enable", "--training.spike_loss_factor=1")) == [
        "training.spike_loss_factor = 1: about half of all steps are above their median; set it above 1"
    ]
    assert problems((back, "--checkpoint.enable")) == problems(("--training.spike_loss_factor=1",)) == []
    early = ("--optimizer.early_step_in_backward", "--training.max_norm=inf", "--training.on_spike=skip")
    assert problems(early) == [
        "optimizer.early_step_in_backward = true: weights move before a step is known to be bad, so that none can be"
        ' skipped; set training.on_spike to "stop" or "rollback", or this to false'
    ]


def test_settings_of_spikes_are_idle_without_them() -> None:
    spiky = load_job(("--training.on_spike=stop",), {}).job
    for key in ("training.spike_window", "training.spike_loss_factor", "training.spike_grad_norm_factor"):
        assert inactive(load_job((), {}).job, key) == 'training.on_spike is "ignore"'
        assert inactive(spiky, key) is None
