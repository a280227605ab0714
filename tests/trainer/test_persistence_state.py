"""What a job takes from its checkpoint, and what it refuses although its bytes are as they were saved."""

import errno
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import reseal
from tests.ranks import run_ranks
from tests.trainer.runs import TINY, Outcome, call, facts, launch, meeting_point, records, train

SAVING = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=2", "--training.global_batch_size=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(1, folder, *SAVING)
    return folder


def built(argv: list[str], environ: dict[str, str]) -> Any:
    """The Trainer of a job."""
    import os

    from trainer.command import import_custom
    from trainer.config.load import resolve
    from trainer.trainer import Trainer

    os.environ.update(environ)
    resolved = resolve(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    return Trainer(resolved, os.environ)


def save_at_start(argv: list[str], environ: dict[str, str]) -> list[bool]:
    """Build a job and save it as a signal before its first step would."""
    trainer = built(argv, environ)
    with ThreadPoolExecutor(1) as beside:  # as a signal does
        arguments = (trainer.settled, trainer.parts, trainer.identity)
        was_there = [beside.submit(trainer.persistence.ensure_saved, *arguments).result() for _ in range(2)]
    trainer.close()
    return was_there


def fail_to_save(argv: list[str], environ: dict[str, str]) -> tuple[str, bool]:
    """What a save on a signal is told that cannot be, and whether its step is still due."""
    trainer = built(argv, environ)

    def fail(*_: object) -> None:
        raise CheckpointError("no space left, says the test")

    trainer.persistence.store.save = fail
    with ThreadPoolExecutor(1) as beside, pytest.raises(CheckpointError) as error:
        beside.submit(trainer.persistence.ensure_saved, trainer.settled, trainer.parts, trainer.identity).result()
    return str(error.value), trainer.persistence.is_due(0, last=True)


def test_a_step_that_could_not_be_saved_on_a_signal_is_still_due(tmp_path: Path) -> None:
    """Else a job whose last step it is would end as if it had been saved."""
    argv = [*TINY, *SAVING, f"--job.dump_folder={tmp_path}"]
    told = run_ranks(1, fail_to_save, argv, meeting_point(), backend=None)
    assert told == [("no space left, says the test", True)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_that_was_stopped_before_its_first_step_goes_on_from_step_0(
    ranks: int, whole: Path, tmp_path: Path
) -> None:
    """With everything, unlike from a seed, which holds weights alone."""
    argv = [*TINY, *SAVING, f"--job.dump_folder={tmp_path}"]
    assert run_ranks(ranks, save_at_start, argv, meeting_point(), backend=None) == [[False, True]] * ranks
    outcomes = launch(ranks, tmp_path, *SAVING)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert "loaded step-0\n" in outcomes[0].stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert [facts(record) for record in records(tmp_path)] == [
        pytest.approx(facts(record), rel=1e-5) for record in records(whole)
    ]


def forge(whole: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    shutil.copytree(whole, folder)
    path = folder / "checkpoint/step-2/state.json"
    state = json.loads(path.read_bytes())
    change(state)
    path.write_text(json.dumps(state))
    reseal(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["train_state"].update(step=3), "checkpoint step-2: its train_state is of step 3"),
        (lambda s: s["lr_scheduler"].update(start=3), "checkpoint step-2: its lr_scheduler starts at step 3"),
        (lambda s: s["train_state"].pop("tokens"), "checkpoint step-2 does not fit: missing in its state: "),
        (lambda s: s.pop("lr_scheduler"), "checkpoint step-2 does not fit: missing in its state: lr_scheduler"),
        (
            lambda s: s["dataloader"].update(table=[["a"] * 5] * len(s["dataloader"]["table"])),
            "checkpoint step-2: ValueError: invalid literal for int() with base 10: 'a'",
        ),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, whole: Path, tmp_path: Path
) -> None:
    forge(whole, tmp_path / "run", change)
    (outcome,) = launch(1, tmp_path / "run", *SAVING, "--training.steps=3")
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_a_schedule_does_not_begin_after_steps_that_are_counted_anew(whole: Path, tmp_path: Path) -> None:
    """Its first step would be one long before it, at a negative learning rate."""
    start = (f"--checkpoint.initial_load_path={whole}/checkpoint/step-2", "--checkpoint.initial_load_model_only=false")
    leave = "--checkpoint.exclude_from_loading="
    train(1, tmp_path / "a", *SAVING, *start, f"{leave}lr_scheduler", "--training.steps=4")  # begins at step 2
    start = (f"--checkpoint.initial_load_path={tmp_path}/a/checkpoint/step-4", start[1])
    rates = [record["lr"] for record in train(1, tmp_path / "b", *SAVING, *start, f"{leave}train_state")]
    assert rates == [record["lr"] for record in records(whole)]


def test_what_became_of_saves_is_recorded(whole: Path) -> None:
    (event,) = [e for e in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "event" in e]
    manifest = json.loads((whole / "checkpoint/step-2/manifest.json").read_bytes())
    size = sum(entry["size"] for entry in manifest["files"])
    assert {**event, "seconds": 0, "stall_seconds": 0} == {
        "event": "saved",
        "step": 2,
        "kind": "training",
        "seconds": 0,
        "stall_seconds": 0,
        "bytes": size,
    }
    assert 0 < event["stall_seconds"] <= event["seconds"]


def without_room(argv: list[str], environ: dict[str, str]) -> Outcome:
    """The job on a disk that has no room for tensors."""

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.save", write)
        return call(argv, environ)


def test_also_of_the_save_that_is_one_too_many(tmp_path: Path) -> None:
    argv = [*TINY, *SAVING, "--training.steps=6", "--checkpoint.max_failed_saves=2", f"--job.dump_folder={tmp_path}"]
    (outcome,) = run_ranks(1, without_room, argv, meeting_point(), backend=None)
    assert outcome.code == 1
    assert "error: checkpoint.max_failed_saves = 2: the last 2 saves have failed: " in outcome.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines if "event" in line] == [
        ("save_failed", 2),
        ("save_failed", 4),
    ]
