"""The resume matrix: a job saved under one layout goes on under another, with the same rows and the same numbers.

Each layout that saves is run once, whole; its checkpoint of step 2 is what others go on from. All are compared with the
same job on one rank, uninterrupted: each row of each step with its cursor, losses and gradient norms.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.layout import Layout
from tests.reliability.resuming import Step, run

DENSE, MOE = "llama/dense", "qwen/moe"
FAST = (
    (DENSE, "", "ddp=2", "workers"),
    (DENSE, "", "tp=2", ""),
    (MOE, "fsdp=2 ep=2", "pp=2", ""),
)
SLOW = (
    (DENSE, "ddp=2", "fsdp=2", "accumulate"),
    (DENSE, "ddp=2", "cp=2", "workers"),
    (DENSE, "fsdp=4", "fsdp=2 tp=2", ""),
    (DENSE, "fsdp=4", "pp=4", ""),
    (DENSE, "fsdp=2 tp=2", "ddp=2 cp=2", ""),
    (DENSE, "fsdp=2 tp=2", "fsdp=8", ""),
    (DENSE, "pp=2 fsdp=2", "tp=4", ""),
    (DENSE, "pp=2 fsdp=2", "", "accumulate workers"),
    (DENSE, "ddp=2 fsdp=2 tp=2", "cp=4", ""),
    (DENSE, "ddp=2 fsdp=2 tp=2", "fsdp=2 cp=2 pp=2", "workers"),
    (MOE, "fsdp=2 ep=2", "fsdp=4", ""),
    (MOE, "fsdp=4 ep=4", "tp=2 ep=2", ""),
    (MOE, "fsdp=4 ep=4", "fsdp=2 cp=2 ep=2", "accumulate"),
    (MOE, "tp=2 etp=2", "ddp=2 fsdp=2 ep=2", "workers"),
    (MOE, "fsdp=2 tp=2 cp=2 ep=4", "", ""),
    (MOE, "fsdp=2 tp=2 cp=2 ep=4", "tp=2 pp=2 ep=2", ""),
)
PAIRS = [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
BACK = (
    (DENSE, "", "ddp=2 tp=2", ""),
    (DENSE, "fsdp=2 tp=2", "pp=2", "workers"),
    (MOE, "fsdp=4 ep=4", "cp=2 ep=2", ""),
)
Whole = Callable[[str, str], tuple[Path, list[Step]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A model and a layout → the folder of the uninterrupted run, and its steps; run once."""
    done: dict[tuple[str, str], tuple[Path, list[Step]]] = {}

    def of(model: str, axes: str) -> tuple[Path, list[Step]]:
        if (model, axes) not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[model, axes] = folder, run(Layout(model, axes), folder)
        return done[model, axes]

    return of


def same(found: list[Step], want: list[Step]) -> None:
    """The same rows in the same order; losses and norms but for rounding."""
    assert [step.step for step in found] == [step.step for step in want]
    assert [step.rows for step in found] == [step.rows for step in want]
    assert [step.tokens for step in found] == [step.tokens for step in want]
    for name in ("loss", "grad_norm"):
        values = [getattr(step, name) for step in want]
        assert [getattr(step, name) for step in found] == pytest.approx(values, rel=1e-5, abs=0), name


@pytest.mark.parametrize(("model", "before", "after", "modifiers"), PAIRS)
def test_another_layout_goes_on(
    model: str, before: str, after: str, modifiers: str, whole: Whole, tmp_path: Path
) -> None:
    folder, steps = whole(model, before)
    _, want = whole(model, "")
    same(steps, want)
    same(run(Layout(model, after, modifiers), tmp_path, folder / "checkpoint/step-2"), want[2:])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "here", "there", "modifiers"), BACK)
def test_there_and_back(model: str, here: str, there: str, modifiers: str, whole: Whole, tmp_path: Path) -> None:
    """Steps 3 and 4 under another layout, then 5 and 6 under the first one again."""
    folder, _ = whole(model, here)
    _, want = whole(model, "")
    same(run(Layout(model, there, modifiers), tmp_path / "there", folder / "checkpoint/step-2"), want[2:])
    same(run(Layout(model, here), tmp_path / "back", tmp_path / "there/checkpoint/step-4"), want[4:])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "axes"), [(DENSE, "fsdp=2 tp=2"), (MOE, "fsdp=4 ep=4")])
def test_the_same_layout_goes_on_bit_for_bit(model: str, axes: str, whole: Whole, tmp_path: Path) -> None:
    folder, steps = whole(model, axes)
    assert run(Layout(model, axes), tmp_path, folder / "checkpoint/step-2") == steps[2:]
    last = [path / "checkpoint/step-6" for path in (folder, tmp_path)]
    tensors = [sorted(path.name for path in step.iterdir() if path.suffix == ".distcp") for step in last]
    assert tensors[0] == tensors[1]
    assert tensors[0]
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in tensors[0])
