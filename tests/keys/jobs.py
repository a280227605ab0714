"""Several small jobs one after the other in one forked process: a key is shown by two jobs that differ in it alone."""

import gc
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, Outcome, call, meeting_point, records

SMALL = (
    *TINY,
    "--training.global_batch_size=4",
    "--training.local_batch_size=2",
    "--experimental.custom_import=tests.keys.recording",
)
"""The tiny job with four rows a step: a third of a second."""


@dataclass(frozen=True)
class Done:
    """What a job left behind."""

    outcome: Outcome
    folder: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Its step records; it must have succeeded."""
        assert self.outcome.code == 0, self.outcome.stderr
        return records(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its other records."""
        return [e for e in map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines()) if "event" in e]

    @property
    def log(self) -> str:
        """Its messages; it must have succeeded."""
        assert self.outcome.code == 0, self.outcome.stderr
        return self.outcome.stderr

    def column(self, name: str) -> list[float]:
        """One number of each step."""
        return [record[name] for record in self.steps]

    def files(self, below: str = ".") -> list[str]:
        """Paths of all files below one of its folders."""
        folder = self.folder / below
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def makers(file: Path) -> Counter[str]:
    """Process → rows that it made, from what the dataset `recording` has noted."""
    return Counter(file.read_text().split())


def surroundings() -> dict[str, str]:
    """The environment of a job: on the CPU, also where there is an accelerator."""
    return {**meeting_point(), "ESPALIER_DEVICE": "cpu"}


def in_turn(jobs: list[tuple[list[str], dict[str, str]]]) -> list[Outcome]:
    """Run jobs one after the other in this process, each with its environment."""
    gc.freeze()
    gc.unfreeze = lambda: None  # else each job looks through all of torch for garbage, for two thirds of its time
    return [call(argv, environ) for argv, environ in jobs]


def run_jobs(folder: Path, jobs: Mapping[str, tuple[str, ...]], ranks: int = 1, **environ: str) -> dict[str, Done]:
    """Run named jobs, each the small job with these arguments on top, in a folder of its name; what rank 0 left.

    An argument may say `{folder}`, the folder of all jobs.
    """
    argvs = [
        [*SMALL, f"--job.dump_folder={folder}/{name}", *(argument.replace("{folder}", str(folder)) for argument in job)]
        for name, job in jobs.items()
    ]
    # A port for each job: ranks that meet again at the same one may meet the store of the job before.
    jobs_in_turn = [(argv, surroundings() | environ) for argv in argvs]
    outcomes, *_ = run_ranks(ranks, in_turn, jobs_in_turn, backend=None, timeout=300)
    return {name: Done(outcome, folder / name) for name, outcome in zip(jobs, outcomes, strict=True)}
