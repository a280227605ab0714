"""The house rules of CONTRIBUTING.md that a machine can check: sizes, annotations, docstrings, what may be imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("trainer", "models", "components", "experiments", "scripts", "tests")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def median(numbers: list[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


def test_no_function_is_over_80_lines_and_most_are_under_15() -> None:
    sizes = {f"{name_of(path)}:{node.lineno} {node.name}": length(node) for path in SOURCES for node in functions(path)}
    assert {name: size for name, size in sizes.items() if size > 80} == {}
    assert median(list(sizes.values())) < 15


def test_no_file_is_over_600_lines_and_most_are_under_200() -> None:
    sizes = {name_of(path): path.read_text().count("\n") for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 600} == {}
    assert median(list(sizes.values())) < 200


def test_the_trainer_fits_on_a_screen() -> None:
    methods = {node.name: length(node) for node in functions(ROOT / "trainer/trainer.py")}
    assert methods["__init__"] <= 60
    assert methods["train"] <= 45
    assert methods["train_step"] <= 45


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


def test_no_assert_outside_tests() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_no_blanket_handlers_and_no_blanket_ignores() -> None:
    found = []
    for path in FILES:
        text = path.read_text()
        found += [
            f"{name_of(path)}:{handler.lineno} bare or silent except"
            for handler in ast.walk(ast.parse(text))
            if isinstance(handler, ast.ExceptHandler)
            and (handler.type is None or (len(handler.body) == 1 and isinstance(handler.body[0], ast.Pass)
                 and isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")))
        ]  # fmt: skip
        found += [
            f"{name_of(path)}:{number} blanket ignore"
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(r"#\s*(noqa(?!:)|type:\s*ignore(?!\[)|pyrefly:\s*ignore(?!\s*\[))", line)
        ]
    assert found == []


def test_no_tensors_are_unpickled_with_code() -> None:
    pattern = re.compile(r"weights_only\s*=\s*False|\bpickle\.loads?\(")
    found = [name_of(path) for path in SOURCES if pattern.search(path.read_text())]
    assert found == []


def test_everything_is_annotated() -> None:
    missing = []
    for path in SOURCES:
        for node in functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (node.returns is None and node.name != "__init__"):
                missing.append(f"{name_of(path)}:{node.lineno} {node.name}({', '.join(bare)})")
    assert missing == []


def test_mutable_module_state_is_only_registries() -> None:
    mutable = (ast.List, ast.Set, ast.ListComp, ast.SetComp)
    found = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            names = [ast.unparse(t) for t in getattr(node, "targets", [getattr(node, "target", None)]) if t is not None]
            if isinstance(value, mutable) or (
                isinstance(value, ast.Dict) and not all(name.isupper() or name.strip("_").isupper() for name in names)
            ):
                found.append(f"{name_of(path)}:{node.lineno} {', '.join(names)}")  # fmt: skip
    assert found == []


def imported_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh interpreter."""
    program = f"{code}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_trainer_brings_no_optional_package() -> None:
    loaded = imported_by("import trainer.trainer, trainer.launch, trainer.command")
    assert loaded & {"triton", "torchao", "transformers", "wandb", "tensorboard", "datasets", "pandas"} == set()


def test_families_and_their_arguments_import_no_torch() -> None:
    loaded = imported_by("import models.train_spec, models.llama3, models.llama3.args, components.config.job_config")
    assert "torch" not in loaded


def test_commits_name_no_machine() -> None:
    pattern = re.compile(r"/(work|root|farm)/|pypi\.org|files\.pythonhosted|huggingface\.co/datasets")
    texts = [*FILES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "run_train.sh", *ROOT.glob("scripts/*.sh")]
    assert [name_of(path) for path in texts if path != Path(__file__) and pattern.search(path.read_text())] == []
