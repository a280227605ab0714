"""`docs/reliability.md` says neither more nor less than what is tested: its tests exist, its figures were recorded."""

import ast
import re
from pathlib import Path

import pytest

from tests.reliability.harness_figures import figures
from tests.reliability.page import SECTIONS, Promise, page

ROOT = Path(__file__).parents[2]
PROMISES = [promise for rows in SECTIONS.values() for promise in rows]
EVIDENCE = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.tests[0])
def test_its_tests_exist(promise: Promise) -> None:
    for test in promise.ids():
        file, name = test.split("::")
        assert name in functions(ROOT / file), test


def test_all_evidence_is_on_the_page() -> None:
    used = {Path(test.split("::")[0]).name for promise in PROMISES for test in promise.ids()}
    assert EVIDENCE - used == set()


def test_all_figures_are_recorded_and_used() -> None:
    assert {promise.figure for promise in PROMISES if promise.figure} == {*figures()}


def test_numbers_of_the_figures_are_those_of_the_tests() -> None:
    from tests.reliability.test_corruption_hostile import HARMLESS, REFUSED
    from tests.reliability.test_resume_matrix import BACK, PAIRS

    assert figures()["hostile"].startswith(f"{len(REFUSED) + len(HARMLESS)} forged checkpoints: ")
    assert f"{len(PAIRS)} pairs of unlike layouts, {len(BACK)} of them there and back" in page()
    kills, *windows, elsewhere = map(int, re.findall(r"\d+", figures()["kills"])[:5])
    assert kills == sum(windows) + elsewhere == 190
    assert 3 * sum(windows) >= kills


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs/reliability.md").read_text() == page()
