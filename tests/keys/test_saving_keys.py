"""What `[checkpoint]` does while it saves: in the background or not, and when saves fail."""

import pytest

from components.checkpoint.checkpointer import Checkpointer
from tests.keys.jobs import Done, run_jobs

shows = pytest.mark.shows
SAVING = ("--checkpoint.enable", "--checkpoint.interval=1")
FULL = (
    *SAVING,
    "--training.steps=5",
    "--experimental.custom_import=tests.keys.full_storage",
    "--checkpoint.folder=full://{folder}/kept",
)
JOBS = {
    "disabled": SAVING,
    "async": (*SAVING, "--checkpoint.async_mode=async"),
    "async_with_pinned_mem": (*SAVING, "--checkpoint.async_mode=async_with_pinned_mem"),
    "three": (*FULL, "--checkpoint.max_failed_saves=3"),
    "late": (
        *FULL,
        "--training.steps=4",
        "--checkpoint.async_mode=async",
        "--checkpoint.folder=full://{folder}/late",
    ),
    "two": (*FULL, "--checkpoint.max_failed_saves=2", "--checkpoint.folder=full://{folder}/stopped"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), JOBS)


def hashes(job: Done) -> list[list[str]]:
    """What the files of each checkpoint hash to; DCP's own index names the folder."""
    run = Checkpointer(job.folder / "checkpoint", keep_latest_k=0, group=None)
    files = [run.read_manifest(step).files for step in (1, 2, 3)]
    return [[h for file in each if file.name != ".metadata" for h in file.hashes] for each in files]


@shows("checkpoint.async_mode")
def test_saving_in_the_background(done: dict[str, Done]) -> None:
    there, here, pinned = (done[mode] for mode in ("async", "disabled", "async_with_pinned_mem"))
    assert there.column("loss") == here.column("loss") == pinned.column("loss")
    assert hashes(there) == hashes(here) == hashes(pinned)
    for job in (there, pinned):
        saves = [event for event in job.events if event["event"] == "saved"]
        assert [save["step"] for save in saves] == [1, 2, 3]
        assert all(save["stall_seconds"] < save["seconds"] for save in saves[:2])
    assert all(save["stall_seconds"] == save["seconds"] for save in here.events if save["event"] == "saved")
    ignored = "checkpoint.async_mode: memory is not pinned: this machine has no accelerator\n"
    assert [ignored in job.log for job in (here, there, pinned)] == [False, False, True]


@shows("checkpoint.max_failed_saves")
def test_a_run_ends_with_so_many_failed_saves_in_a_row(done: dict[str, Done]) -> None:
    failed = [event["step"] for event in done["three"].events if event["event"] == "save_failed"]
    assert (done["three"].column("step"), failed) == ([1, 2, 3, 4, 5], [2, 3])
    saved = [event["step"] for event in done["three"].events if event["event"] == "saved"]
    assert saved == [1, 4, 5]
    assert len(done["late"].steps) == 4  # where only the end of the run told of step 3's
    events = [(event["event"], event["step"]) for event in done["late"].events if "save" in event["event"]]
    assert events == [("saved", 1), ("save_failed", 2), ("save_failed", 3), ("saved", 4)]
    two = done["two"]
    assert two.outcome.code == 1
    assert [line.split()[1] for line in two.outcome.stdout.splitlines()] == ["1", "2", "3"]
    assert "error: checkpoint.max_failed_saves = 2: the last 2 saves have failed: cannot save step-2 in '" in (
        two.outcome.stderr
    )
