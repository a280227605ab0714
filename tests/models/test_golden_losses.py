"""Every debug flavor's first losses are what they were, on one rank and on two."""

from pathlib import Path

import pytest

from tests.models.golden import FOLDER, STEPS, configs, losses, name_of, read


@pytest.mark.slow
@pytest.mark.parametrize("config", configs(), ids=name_of)
def test_on_one_rank(config: Path, tmp_path: Path) -> None:
    golden = read(config)["losses"]
    assert len(golden) == STEPS
    assert losses(config, tmp_path, 1) == pytest.approx(golden, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", configs(), ids=name_of)
def test_on_two_ranks(config: Path, tmp_path: Path) -> None:
    assert losses(config, tmp_path, 2) == pytest.approx(read(config)["losses"], rel=1e-4)


def test_each_has_a_reason_and_a_config() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {name_of(config) for config in configs()}
    assert all(read(config)["reason"].strip() for config in configs())
