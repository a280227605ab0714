"""The example at the top of docs/data.md is a job."""

import re
from pathlib import Path

import pytest

from trainer.check import run_check
from trainer.config.load import resolve


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```toml\n(.*?)```", Path("docs/data.md").read_text(), re.DOTALL)
    assert found
    file = tmp_path / "mix.toml"
    file.write_text(found.group(1))
    assert run_check([str(file)], {}) == 0
    assert "tokens per step  262,144\n" in capsys.readouterr().out
    job = resolve([f"--job.config_file={file}"], {}).job
    weights = {source.name: source.weight for source in job.data.sources}
    assert weights == {"web": 6, "code": 3, "books": 1.5, "chats": 0.5}
    assert sum(weights.values()) == 11
    assert [source.name for source in job.validation.sources] == ["books", "news"]
