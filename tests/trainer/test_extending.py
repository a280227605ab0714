"""What docs/extending.md shows works as it stands there."""

import re
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.runs import ROOT, TINY, Outcome, call, records

PAGE = (ROOT / "docs/extending.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def with_module(folder: str, argv: list[str]) -> Outcome:
    import sys

    sys.path.insert(0, folder)
    return call(argv, {})


def test_a_loss_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "my_ideas.py").write_text("from tests.trainer import tiny\n" + blocks("python")[0])
    toml = tmp_path / "job.toml"
    toml.write_text(blocks("toml")[0])
    plain = [a for a in TINY if not a.startswith("--experimental")]
    argv = [*plain, f"--job.config_file={toml}", f"--job.dump_folder={tmp_path / 'out'}"]
    (outcome,) = run_ranks(1, with_module, str(tmp_path), argv, backend=None)
    assert outcome.code == 0, outcome.stderr
    (usual,) = run_ranks(1, call, [*TINY, f"--job.dump_folder={tmp_path / 'usual'}"], {}, backend=None)
    assert usual.code == 0
    mine, theirs = records(tmp_path / "out"), records(tmp_path / "usual")
    extra = [a["loss"] - b["loss"] for a, b in zip(mine, theirs, strict=True)]
    assert extra[0] == pytest.approx(1e-4 * 8.1**2, rel=0.05)  # log 2048, and half of the first logits' variance of 1


def test_a_family_of_one_s_own_is_told_as_it_is() -> None:
    """The page's outline names what TrainSpec and Plan really have."""
    from dataclasses import fields

    from components.mesh.plan import Plan
    from models.train_spec import TrainSpec

    outline = blocks("python")[1]
    assert set(re.findall(r"^ {8}(\w+)=", outline, re.MULTILINE)) <= {field.name for field in fields(TrainSpec)}
    assert set(re.findall(r"(\w+)=\(?\"", outline)) <= {field.name for field in fields(Plan)}


def test_the_plan_for_every_layout_is_llama_3_s() -> None:
    from models.decoder.args import ORDER
    from models.decoder.plan import decoder_plan
    from models.llama3.args import FLAVORS

    page: dict[str, object] = {}
    exec(blocks("python")[2], page)
    assert page["PLAN"] == decoder_plan(FLAVORS["1B"])
    assert page["ORDER"] == ORDER
