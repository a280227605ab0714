"""The first losses of the tiny job, kept in the repository: what it computes changes on purpose or not at all.

Regenerate with `python -m tests.trainer.test_golden`, and say why in the commit.
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.trainer.runs import ROOT, facts, train

GOLDEN = ROOT / "tests/golden/tiny_llama.json"
VARIANTS = {"plain": (), "document mask": ("--data.document_mask",), "tied": ("--model.flavor=tied",)}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_what_they_were(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    found = [facts(record) for record in train(1, tmp_path, "--training.steps=5", *VARIANTS[name])]
    assert found == [pytest.approx(step, rel=1e-4) for step in golden]


def regenerate() -> None:
    values = {}
    for name, arguments in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            values[name] = [facts(r) for r in train(1, Path(folder), "--training.steps=5", *arguments)]
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    regenerate()
