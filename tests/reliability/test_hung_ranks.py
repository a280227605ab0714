"""A rank that is killed under `torchrun --max-restarts` comes back from the last checkpoint without help.

What is said of a rank that hangs, and when, is in `tests/trainer/test_stalls.py`.
"""

import subprocess
from pathlib import Path

import pytest

from tests.trainer.runs import ROOT, TINY, facts, records
from tests.trainer.test_launch import environment

ARGUMENTS = (
    *TINY,
    "--experimental.custom_import=tests.reliability.killing",
    "--training.local_batch_size=6",
    "--training.steps=6",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
)


def torchrun(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The job under the plain launcher of torch."""
    launcher = ["torchrun", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    where = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "trainer"]
    argv = [*launcher, *where, *ARGUMENTS, f"--job.dump_folder={folder}"]
    environ = environment(**variables)
    return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    done = torchrun(folder, KILLS="")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["1:4", "0:4", "1:2 0:5"])
def test_a_killed_rank_comes_back_by_itself(kills: str, whole: Path, tmp_path: Path) -> None:
    """`kills`: rank and step, each at most once."""
    done = torchrun(tmp_path, KILLS=kills, KILLED_FILE=str(tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").read_text().split() == kills.split()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [facts(record) for record in records(tmp_path)] == [facts(record) for record in records(whole)]
    saved = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert saved == ["step-2", "step-4", "step-6"]
