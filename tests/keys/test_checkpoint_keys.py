"""What `[checkpoint]` does: which folders are there after a job, and what the next one starts from."""

import pytest

from components.checkpoint.checkpointer import Checkpointer
from tests.keys.jobs import Done, run_jobs

shows = pytest.mark.shows
SAVING = ("--checkpoint.enable", "--checkpoint.interval=1")
LAST = (*SAVING, "--checkpoint.interval=500")
SAVED = (*SAVING, "--job.dump_folder={folder}/saved", "--checkpoint.load_only")
START = (*LAST, "--checkpoint.initial_load_path={folder}/saved/checkpoint/step-2")
JOBS = {
    "off": SAVING[1:],
    "saved": SAVING,
    "folder": (*LAST, "--checkpoint.folder=kept/here"),
    "interval": (*SAVING, "--checkpoint.interval=2"),
    "enable_first_step_checkpoint": (*LAST, "--checkpoint.enable_first_step_checkpoint"),
    "keep_latest_k": (*SAVING, "--checkpoint.keep_latest_k=2"),
    "load_only": (*SAVING, "--checkpoint.load_only"),
    "last_save_model_only": (*LAST, "--checkpoint.last_save_model_only"),
    "export_dtype": (*LAST, "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16"),
    "latest": SAVED,
    "load_step": (*SAVED, "--checkpoint.load_step=1"),
    "initial_load_path": START,
    "initial_load_model_only": (*START, "--checkpoint.initial_load_model_only=false"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), JOBS)


@shows(
    "checkpoint.enable",
    "checkpoint.folder",
    "checkpoint.interval",
    "checkpoint.enable_first_step_checkpoint",
    "checkpoint.keep_latest_k",
    "checkpoint.load_only",
)
def test_what_is_saved(done: dict[str, Done]) -> None:
    saved = {
        "off": [],
        "saved": ["checkpoint/step-1", "checkpoint/step-2", "checkpoint/step-3"],
        "folder": ["kept/here/step-3"],
        "interval": ["checkpoint/step-2", "checkpoint/step-3"],
        "enable_first_step_checkpoint": ["checkpoint/step-1", "checkpoint/step-3"],
        "keep_latest_k": ["checkpoint/step-2", "checkpoint/step-3"],
        "load_only": [],
    }
    for name, folders in saved.items():
        assert [f for f in done[name].files() if f.endswith("manifest.json")] == [f"{f}/manifest.json" for f in folders]
        assert done[name].column("loss") == done["off"].column("loss")


@shows("checkpoint.last_save_model_only", "checkpoint.export_dtype")
def test_weights_only(done: dict[str, Done]) -> None:
    def last(name: str) -> tuple[str, int]:
        manifest = Checkpointer(done[name].folder / "checkpoint", keep_latest_k=0, group=None).read_manifest(3)
        return manifest.kind, sum(entry.size for entry in manifest.files)

    (kind, everything), (short_kind, weights), (_, halved) = map(
        last, ("interval", "last_save_model_only", "export_dtype")
    )
    assert (kind, short_kind) == ("training", "model_only")
    assert 4 * 107_256 < weights < 0.4 * everything
    assert 2 * 107_256 < halved < 0.6 * weights


@shows("checkpoint.load_step")
def test_where_a_job_goes_on(done: dict[str, Done]) -> None:
    assert "loaded step-3\n" in done["latest"].outcome.stderr
    assert "nothing to do: step 3 of training.steps = 3 is done\n" in done["latest"].outcome.stderr
    assert "loaded step-1\n" in done["load_step"].outcome.stderr
    assert [line[:6] for line in done["load_step"].outcome.stdout.splitlines()] == ["step 2", "step 3"]


@shows("checkpoint.initial_load_path", "checkpoint.initial_load_model_only")
def test_what_a_job_starts_from(done: dict[str, Done]) -> None:
    fresh, weights, everything = (done[n].steps for n in ("off", "initial_load_path", "initial_load_model_only"))
    assert [step["step"] for step in weights] == [1, 2, 3]
    assert weights[0]["tokens"] == fresh[0]["tokens"]
    assert weights[0]["loss"] != fresh[0]["loss"]
    assert [step["step"] for step in everything] == [3]
    assert everything[0]["loss"] == fresh[2]["loss"]
