"""The losses of the first steps of every debug flavor, kept in the repository with the reason of their last change.

What a family computes changes on purpose or not at all. `scripts/record_losses.py` writes them anew.
"""

import json
from pathlib import Path
from typing import Any

from components.config.job_config import JobConfig
from models.train_spec import get_args
from tests.ranks import run_ranks
from tests.trainer.runs import ROOT, call, meeting_point, records
from trainer.config.load import load_job

FOLDER = ROOT / "tests/golden/losses"
STEPS = 20
SHORT = (
    f"--training.steps={STEPS}",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--validation.no_enable",
    "--metrics.log_freq=1",
)


def configs() -> list[Path]:
    """The debug TOMLs of all families."""
    return sorted(ROOT.glob("models/*/train_configs/debug_model*.toml"))


def name_of(config: Path) -> str:
    """What its golden file is called."""
    return f"{config.parent.parent.name}_{config.stem}"


def losses(config: Path, folder: Path, ranks: int) -> list[float]:
    """Of the first steps, on one rank, or on two that share experts if there are any, else every matrix."""
    job: JobConfig = load_job([f"--job.config_file={config}"], {}).job
    args: Any = get_args(job.model.name, job.model.flavor)
    kind = "tensor" if getattr(args, "experts", None) is None else "expert"
    layout = () if ranks == 1 else (f"--parallelism.{kind}_parallel_degree={ranks}",)
    argv = [f"--job.config_file={config}", f"--job.dump_folder={folder}", *SHORT, *layout]
    outcomes = run_ranks(ranks, call, argv, meeting_point(), backend=None, timeout=300)
    if failed := [outcome.stderr for outcome in outcomes if outcome.code]:
        raise RuntimeError(failed[0])
    return [record["loss"] for record in records(folder)]


def read(config: Path) -> dict[str, Any]:
    """Its golden file."""
    return json.loads((FOLDER / f"{name_of(config)}.json").read_text())


def write(config: Path, reason: str, found: list[float]) -> Path:
    """Its golden file."""
    path = FOLDER / f"{name_of(config)}.json"
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps({"reason": reason, "losses": found}, indent=1) + "\n")
    return path
