"""scripts/new_model.py: what it writes trains, agrees with transformers and is in order as it stands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.runtime.errors import ConfigError
from trainer.scaffold import FILES, write_family

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("components", "models", "trainer", "experiments", "scripts", "tests")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the tool touches."""
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models/train_spec.py", tmp_path / "models")
    return tmp_path


@pytest.mark.parametrize("name", ["abacus", "my_model", "zeta2"])
def test_it_writes_the_files_and_registers_the_family_in_its_place(name: str, tree: Path) -> None:
    written = {str(path.relative_to(tree)) for path in write_family(name, tree)}
    assert written == {path.replace("$name", name) for path in FILES} | {"models/train_spec.py"}
    before = (ROOT / "models/train_spec.py").read_text().splitlines()
    after = (tree / "models/train_spec.py").read_text().splitlines()
    added = [line.strip() for line in after if line not in before]
    assert added == [
        f"from models.{name}.args import FLAVORS as {name.upper()}",
        f'register_family("{name}", {name.upper()}, "models.{name}.spec:load")',
    ]
    names = [line.split(".")[1] for line in after if line.startswith("    from models.") and "FLAVORS as" in line]
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["My", "3d", "a-b", "class", "", "../x", "a_", "gpt oss"])
def test_names_that_cannot_be_are_refused(name: str, tree: Path) -> None:
    with pytest.raises(ConfigError, match="a family's name is a Python module's"):
        write_family(name, tree)
    assert [path.name for path in (tree / "models").iterdir()] == ["train_spec.py"]


def test_nothing_is_written_over(tree: Path) -> None:
    write_family("mine", tree)
    for name in ("mine", "train_spec"):
        with pytest.raises(ConfigError, match=f"'{name}': there is a models/{name} already; choose another name"):
            write_family(name, tree)
    (tree / "models/train_spec.py").write_text("")
    with pytest.raises(ConfigError, match="no line like"):
        write_family("other", tree)
    assert not (tree / "models/other").exists()


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.slow
def test_a_new_family_passes_its_tests_and_trains_at_once(tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    done = run(root, "scripts/new_model.py", "my_model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "models/my_model/__init__.py"
    tested = run(root, "-m", "pytest", "-q", "tests/models/my_model", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert run(
        root, "-m", "ruff", "check", "models/my_model", "tests/models/my_model", "models/train_spec.py"
    ).stdout == ("All checks passed!\n")
    formatted = run(root, "-m", "ruff", "format", "--check", "models/my_model", "tests/models/my_model")
    assert formatted.returncode == 0, formatted.stdout
    config = "--job.config_file=models/my_model/train_configs/debug_model.toml"
    trained = run(root, "-m", "trainer", config, "--training.steps=2", f"--job.dump_folder={tmp_path / 'out'}")
    assert trained.returncode == 0, trained.stderr[-3000:]
    again = run(root, "scripts/new_model.py", "my_model")
    assert (again.returncode, again.stderr) == (
        2,
        "error: 'my_model': there is a models/my_model already; choose another name\n",
    )
