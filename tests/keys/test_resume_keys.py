"""What `checkpoint.resume` does: which checkpoint a job goes on from, and when it refuses to."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.keys.jobs import SMALL, Done, run_jobs, surroundings
from tests.keys.test_every_key import problems
from tests.ranks import run_ranks
from tests.trainer.runs import Outcome, call

shows = pytest.mark.shows
SAVING = ("--checkpoint.enable", "--checkpoint.interval=1", "--training.steps=2")
NEVER = "--checkpoint.resume=never"
MUST = "--checkpoint.resume=must"


def broken(saved: Done, name: str) -> Path:
    """A copy of a run's folder whose newest checkpoint has lost its last byte."""
    folder = saved.folder.parent / name
    shutil.copytree(saved.folder, folder)
    state = folder / "checkpoint/step-2/state.json"
    state.write_bytes(state.read_bytes()[:-1])
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run_jobs(tmp_path_factory.mktemp("jobs"), {"saved": SAVING})["saved"]


def run(saved: Done, *jobs: tuple[str, ...]) -> list[Done]:
    names = {f"job{index}-{len(os.listdir(saved.folder.parent))}": job for index, job in enumerate(jobs)}
    return [*run_jobs(saved.folder.parent, names).values()]


@shows("checkpoint.resume")
def test_auto_and_must_go_on_where_there_is_a_whole_checkpoint(saved: Done) -> None:
    there = f"--job.dump_folder={saved.folder}"
    for done in run(saved, (*SAVING, there), (*SAVING, there, MUST)):
        assert "loaded step-2\n" in done.outcome.stderr
        assert "nothing to do: step 2 of training.steps = 2 is done\n" in done.outcome.stderr


@shows("checkpoint.resume")
def test_a_broken_newest_one_is_passed_over_or_stopped_at(saved: Done) -> None:
    auto, must = broken(saved, "broken-auto"), broken(saved, "broken-must")
    size = (saved.folder / "checkpoint/step-2/state.json").stat().st_size
    text = f"checkpoint step-2: state.json has {size - 1} bytes instead of {size}"
    first, second = run(saved, (*SAVING, f"--job.dump_folder={auto}"), (*SAVING, f"--job.dump_folder={must}", MUST))
    assert first.outcome.code == 0
    assert f"{text}: falling back to step-1\n" in first.outcome.stderr
    assert second.outcome.code == 2
    assert second.outcome.stderr.splitlines()[-1] == (
        f'error: checkpoint.resume = "must": {text}; move it away, or take "auto" to go on from the one before'
    )
    assert sorted(os.listdir(must / "checkpoint")) == ["step-1", "step-2"]


@shows("checkpoint.resume")
def test_must_wants_one_of_the_job_s_own(saved: Done) -> None:
    """Weights to start from are not what was asked for: a restart that found no checkpoint would begin again."""
    start = f"--checkpoint.initial_load_path={saved.folder}/checkpoint/step-2"
    for done in run(saved, (*SAVING, MUST), (*SAVING, MUST, start)):
        assert done.outcome.code == 2
        assert done.outcome.stderr.splitlines()[-1] == (
            f'error: checkpoint.resume = "must": there is no checkpoint in \'{done.folder}/checkpoint\'; take "auto"'
            " for a job's first run, whatever it starts from"
        )


@shows("checkpoint.resume")
def test_never_begins_again_and_keeps_what_was_there(saved: Done) -> None:
    folder = saved.folder.parent / "never"
    shutil.copytree(saved.folder, folder)
    (again,) = run(saved, (*SAVING, NEVER, f"--job.dump_folder={folder}"))
    assert again.outcome.code == 0, again.outcome.stderr
    told = re.findall(r"starting anew: (step-\d) is of an earlier course, now '(step-\d)\.", again.outcome.stderr)
    assert told == [("step-1", "step-1"), ("step-2", "step-2")]
    names = sorted(os.listdir(folder / "checkpoint"))
    assert [name.partition(".superseded-")[0] for name in names] == ["step-1", "step-1", "step-2", "step-2"]
    new, old = ((folder / name).read_text().splitlines() for name in ("metrics.jsonl", "metrics.1.jsonl"))
    assert [json.loads(line)["loss"] for line in new if "loss" in line] == saved.column("loss")
    assert old == (saved.folder / "metrics.jsonl").read_text().splitlines()


@shows("checkpoint.resume")
def test_never_touches_nothing_where_nothing_is_saved(saved: Done) -> None:
    arguments = (*SAVING, NEVER, "--checkpoint.load_only", "--training.steps=1")
    folder = saved.folder.parent / "load-only"
    shutil.copytree(saved.folder, folder)
    (done,) = run(saved, (*arguments, f"--job.dump_folder={folder}"))
    assert done.outcome.code == 0
    assert "step 1 " in done.outcome.stdout
    assert sorted(os.listdir(folder / "checkpoint")) == ["step-1", "step-2"]


def restart(argv: list[str], environ: dict[str, str]) -> Outcome:
    return call(argv, environ | {"TORCHELASTIC_RESTART_COUNT": "1"})


def test_a_restart_by_torchrun_does_not_begin_again(saved: Done) -> None:
    argv = [*SMALL, *SAVING, NEVER, f"--job.dump_folder={saved.folder}"]
    (outcome,) = run_ranks(1, restart, argv, surroundings(), backend=None)
    assert outcome.code == 0
    assert "loaded step-2\n" in outcome.stderr
    assert "a rank has failed: all of them have been started again (restart 1)\n" in outcome.stderr


@pytest.mark.parametrize(("since", "loaded"), [("0", "loaded step-2\n"), ("9e9", "loaded step-1, all but optimizer\n")])
def test_a_restart_by_torchrun_goes_on_from_what_the_job_has_saved_since_it_began(
    since: str, loaded: str, saved: Done, tmp_path: Path
) -> None:
    """Not from where it began, with the same parts left out: unless it did not come as far as to save."""
    shutil.copytree(saved.folder, tmp_path / "run")
    begin = ("--checkpoint.load_step=1", "--checkpoint.exclude_from_loading=optimizer")
    argv = [*SMALL, *SAVING, *begin, f"--job.dump_folder={tmp_path}/run"]
    (outcome,) = run_ranks(1, restart, argv, surroundings() | {"ESPALIER_STARTED": since}, backend=None)
    assert outcome.code == 0, outcome.stderr
    assert loaded in outcome.stderr


def test_what_is_left_out_of_another_job_s_checkpoint_is_not_left_out_of_one_s_own(saved: Done) -> None:
    """The same command goes on: neither from step 0, nor without what it had come to."""
    start = (f"--checkpoint.initial_load_path={saved.folder}/checkpoint/step-1", "--training.steps=3")
    parts = ("--checkpoint.initial_load_model_only=false", "--checkpoint.exclude_from_loading=train_state,optimizer")
    folder = f"--job.dump_folder={saved.folder.parent}/tuned"
    first, again = run(saved, *[(*SAVING, *start, *parts, folder)] * 2)
    assert "checkpoint/step-1, all but optimizer, train_state\n" in first.outcome.stderr
    assert again.outcome.code == 0, again.outcome.stderr
    assert "loaded step-3\n" in again.outcome.stderr


def test_what_it_cannot_go_with() -> None:
    assert problems(("--checkpoint.enable", NEVER, "--checkpoint.load_step=3")) == [
        'checkpoint.resume = "never": nothing in checkpoint.folder is loaded, but checkpoint.load_step is 3; leave that'
        ' out, or set this to "auto" or "must"'
    ]
    assert problems(("--checkpoint.enable", MUST, "--checkpoint.create_seed_checkpoint")) == [
        'checkpoint.create_seed_checkpoint = true: a seed is the first checkpoint, but checkpoint.resume = "must" wants'
        ' one; set that to "auto"'
    ]
