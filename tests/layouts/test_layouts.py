"""A layout is how a job runs, never what it computes: every row of the matrix against a plain loop on one process."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from components.runtime.errors import EspalierError
from tests.layouts.facts import EXACT, LOW, differences
from tests.layouts.layout import AXES, Layout
from tests.layouts.matrix import MATRIX
from tests.layouts.mutants import MUTANTS
from tests.layouts.reference import reference
from tests.layouts.run import run
from tests.ranks import run_ranks


def rows(refused: bool) -> list[Any]:
    return [
        pytest.param(layout, id=layout.name, marks=[pytest.mark.slow] if layout.slow else [])
        for layout in MATRIX
        if bool(layout.refused) == refused
    ]


def compare(layout: Layout, folder: Path, mutant: str = "") -> list[str]:
    """How a run of the layout differs from its reference."""
    want, aliases = reference(layout.reference())
    return differences(run(layout, folder, aliases, mutant), want, LOW if layout.low else EXACT)


@pytest.mark.parametrize("layout", rows(refused=False))
def test_a_layout_computes_what_one_process_does(layout: Layout, tmp_path: Path) -> None:
    assert compare(layout, tmp_path) == []


def refusal(argv: list[str], ranks: int) -> str:
    """What a user is told about a job that cannot be, as `check` and the start of training say it."""
    from trainer.command import import_custom, validate_job
    from trainer.config.load import load_job

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    try:
        validate_job(resolved, ranks)
    except EspalierError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("layout", rows(refused=True))
def test_a_layout_is_refused_with_its_reason(layout: Layout) -> None:
    assert run_ranks(1, refusal, layout.arguments(), layout.ranks, backend=None) == [layout.refused]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_is_seen(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    assert compare(mutant.layout, tmp_path / "sound") == []
    assert mutant.shows in "\n".join(compare(mutant.layout, tmp_path / "defective", mutant=name))


def test_no_row_is_there_twice() -> None:
    names = [layout.name for layout in MATRIX]
    assert sorted(names) == sorted(set(names))


def test_every_pair_of_axes_is_in_the_fast_set() -> None:
    """With the narrow bounds: rows in bf16 do not count."""
    together = {
        pair
        for layout in MATRIX
        if not (layout.slow or layout.refused or layout.low)
        for pair in itertools.combinations(axes_of(layout), 2)
    }
    assert set(itertools.combinations(used(), 2)) - together == set()


def test_every_modifier_meets_every_axis() -> None:
    """In the fast set, but for compilation, which takes its time."""
    met = {
        (word, axis)
        for row in MATRIX
        if not row.refused and (not row.slow or "compile" in row.modifiers.split())
        for word in row.modifiers.split()
        for axis in axes_of(row)
    }
    everywhere = [
        "accumulate",
        "recompute",
        "selective",
        "by-op",
        "compile",
        "bf16",
        "chunked",
        "always",
        "never",
        "causal",
    ]
    assert set(itertools.product(everywhere, used())) - met == set()


def test_enough_rows_have_three_axes_and_more() -> None:
    assert sum(len(axes_of(row)) >= 3 and row.ranks <= 8 for row in MATRIX) >= 12


def axes_of(layout: Layout) -> list[str]:
    return [axis for axis in (*AXES, "ep") if int(layout.chosen.get(axis, 1)) > 1]


def used() -> list[str]:
    """The axes that the matrix has."""
    return [axis for axis in (*AXES, "ep") if any(axis in axes_of(layout) for layout in MATRIX)]
