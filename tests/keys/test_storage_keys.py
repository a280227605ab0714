"""What `[checkpoint]` does about where checkpoints are, and how far they are trusted."""

import pytest

from models.llama3.args import FLAVORS
from tests.keys.jobs import Done, run_jobs
from trainer.config.load import load_job
from trainer.config.validate import validate

shows = pytest.mark.shows
SAVING = ("--checkpoint.enable", "--checkpoint.interval=1")
AT_A_URL = (*SAVING, "--checkpoint.folder=memory://{folder}/kept", "--checkpoint.keep_latest_k=1")
THERE = (*SAVING, "--job.dump_folder={folder}/saved", "--checkpoint.load_only")
SAVES = {"saved": SAVING, "url": AT_A_URL, "again": (*AT_A_URL, "--training.steps=4")}
LOADS = {"hashes": THERE, "sizes": (*THERE, "--checkpoint.verify=sizes")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Jobs that save; then a byte of one of their checkpoints changes, in a file that is not loaded; jobs that load."""
    folder = tmp_path_factory.mktemp("jobs")
    saved = run_jobs(folder, SAVES)
    path = folder / "saved/checkpoint/step-3/.metadata"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    return saved | run_jobs(folder, LOADS)


@shows("checkpoint.folder")
def test_checkpoints_at_a_url(done: dict[str, Done]) -> None:
    assert done["url"].column("loss") == done["saved"].column("loss")
    assert not [name for name in done["url"].files() if "step-" in name]
    assert "loaded step-3\n" in done["again"].log
    assert [step["step"] for step in done["again"].steps] == [4]


@shows("checkpoint.verify")
def test_how_far_a_checkpoint_is_trusted(done: dict[str, Done]) -> None:
    assert "checkpoint step-3 is broken: .metadata: bytes 0 to " in done["hashes"].outcome.stderr
    assert "have changed: falling back to step-2\n" in done["hashes"].outcome.stderr
    assert "loaded step-2\n" in done["hashes"].outcome.stderr
    assert "broken" not in done["sizes"].outcome.stderr
    assert "loaded step-3\n" in done["sizes"].outcome.stderr


def test_ranks_have_no_memory_in_common() -> None:
    """Each would keep its own files, and the manifest would list what is nowhere else."""
    job = load_job(("--checkpoint.enable", "--checkpoint.folder=memory://kept"), {}).job
    flavor = FLAVORS["debugmodel"]
    assert validate(job, 1, flavor) == []
    assert validate(job, 2, flavor) == [
        'checkpoint.folder = "memory://kept": 2 ranks do not share their memory; give a place that all of them reach'
    ]
