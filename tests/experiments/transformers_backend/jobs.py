"""Whole jobs of the family, as a user starts them."""

from pathlib import Path
from typing import Any

from tests.trainer import runs

FAMILY = (
    "--experimental.custom_import=experiments.transformers_backend",
    "--model.name=transformers",
    "--data.document_mask=true",
)


def train(ranks: int, dump: Path, flavor: str, *arguments: str) -> list[dict[str, float]]:
    """The facts of each step of a job that must succeed."""
    return [runs.facts(r) for r in runs.train(ranks, dump, *FAMILY, f"--model.flavor={flavor}", *arguments)]


def refused(ranks: int, dump: Path, flavor: str, *arguments: str) -> str:
    """The error of a job that must not start."""
    outcomes: list[Any] = runs.launch(ranks, dump, *FAMILY, f"--model.flavor={flavor}", *arguments)
    assert outcomes[0].code == 2, outcomes[0].stderr
    return outcomes[0].stderr
