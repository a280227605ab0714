"""Jobs that draw from torch's, python's and numpy's generators come back bit for bit, too."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.runs import facts, launch, records, train

DRAWING = (
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--training.steps=4",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--loss.name=drawing",
    f"--experimental.custom_import={__package__}.drawing",
)
JUDGED = ("--validation.enable", "--validation.freq=1", "--validation.dataset=c4_test", "--validation.seq_len=20")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(2, folder, *DRAWING)
    return folder


def cut_off(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint/step-4")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [(), ("--training.dataloader.num_workers=1", *JUDGED, "--validation.steps=1")],
    ids=["as it was", "workers and validation"],
)
def test_the_same_layout_draws_on_where_it_was(arguments: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    """Neither loader nor validation draw from the generators of training."""
    folder = cut_off(whole, tmp_path / "run")
    resumed = train(2, folder, *DRAWING, *arguments)
    assert [facts(record) for record in resumed] == [facts(record) for record in records(whole)]
    again = train(2, tmp_path / "again", *DRAWING, *arguments)
    assert [facts(record) for record in again] == [facts(record) for record in resumed]


def test_without_them_it_draws_otherwise(whole: Path, tmp_path: Path) -> None:
    folder = cut_off(whole, tmp_path / "run")
    resumed = train(2, folder, *DRAWING, "--checkpoint.exclude_from_loading=rng")
    usual = records(whole)
    assert [record["tokens"] for record in resumed] == [record["tokens"] for record in usual]
    assert resumed[2]["loss"] != usual[2]["loss"]
    assert resumed[2]["loss"] == pytest.approx(usual[2]["loss"], rel=0.3)


def test_on_another_layout_they_are_seeded_anew(whole: Path, tmp_path: Path) -> None:
    told = "the layout is not that of step-2: random generators are seeded anew\n"
    outcomes = [launch(1, cut_off(whole, tmp_path / name), *DRAWING)[0] for name in ("one", "two")]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.stderr
        assert told in outcome.stderr
    first, second = records(tmp_path / "one"), records(tmp_path / "two")
    assert [facts(record) for record in first] == [facts(record) for record in second]
    assert first[2]["loss"] != records(whole)[2]["loss"]
