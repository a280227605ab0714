"""scripts/list.py: what it lists is what there is, with numbers that the models themselves have."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.train_spec import families, get_args
from trainer import listing

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/list.py", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def rows(*arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_flavors_are_those_of_the_registry_with_the_models_own_counts() -> None:
    listed: Any = listing.list_flavors(None)
    found = {(row["model"], row["flavor"]): row for row in listed}
    assert {*found} == {(name, flavor) for name in families for flavor in families[name].flavors}
    for name, flavor in (("llama3", "debugmodel"), ("qwen3", "debugmodel_moe")):
        args: Any = get_args(name, flavor)
        with torch.device("meta"):
            model = families[name].load().model_cls(args)
        row = found[name, flavor]
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        idle = sum(
            parameter.numel() * 12 // 16  # 4 of 16 experts see a token
            for parameter_name, parameter in model.named_parameters()
            if ".experts." in parameter_name
        )
        assert row["active"] == row["parameters"] - idle
        assert (row["layers"], row["longest_row"]) == (args.n_layers, args.max_seq_len)


def test_a_family_alone_and_its_table() -> None:
    done = run("flavors", "qwen3")
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["model", "flavor", "parameters", "active", "layers", "longest", "row"]
    assert [line.split()[1] for line in lines] == [*families["qwen3"].flavors]
    assert ["qwen3", "30B-A3B", "30.5B", "3.35B", "48", "40,960"] in [line.split() for line in lines]


def test_models_name_their_smallest_and_their_largest() -> None:
    found = {row["model"]: row for row in rows("models")}
    sizes = [args.parameter_count() for args in families["llama3"].flavors.values()]
    assert found["llama3"] == {
        "model": "llama3",
        "flavors": len(sizes),
        "smallest": min(sizes),
        "largest": max(sizes),
    }
    assert {*found} >= {*families}


def test_configs_are_all_that_are_shipped() -> None:
    found = {row["file"]: row for row in rows("configs")}
    assert {*found} == {
        str(path.relative_to(ROOT))
        for room in ("models", "experiments")
        for path in (ROOT / room).glob("**/train_configs/*.toml")
    }
    row = found["models/qwen3/train_configs/qwen3_30b_a3b.toml"]
    assert row == {
        "file": "models/qwen3/train_configs/qwen3_30b_a3b.toml",
        "model": "qwen3",
        "flavor": "30B-A3B",
        "gpus": 16,
        "about": "Qwen3 30B-A3B from scratch on C4",
    }


def test_datasets_and_optimizers_are_those_of_their_registries_and_of_a_users_module() -> None:
    from components.data.names import DATASETS
    from components.optim.names import OPTIMIZERS

    assert {row["dataset"] for row in listing.list_datasets()} >= {*DATASETS}
    assert {row["optimizer"] for row in listing.list_optimizers()} >= {*OPTIMIZERS}
    found = {row["model"] for row in rows("models", "--custom-import", "tests.trainer.tiny")}
    assert "tiny_llama" in found


def test_an_unknown_family_is_the_users_mistake_and_the_nearest_name_is_said() -> None:
    done = run("flavors", "lama3")
    assert done.returncode == 2
    known = ", ".join(sorted(families))
    assert done.stderr == f"error: 'lama3': no such model family; there are {known}; did you mean llama3?\n"


@pytest.mark.parametrize("what", ["models", "flavors", "configs"])
def test_it_starts_at_once_since_it_imports_no_torch(what: str) -> None:
    program = (
        "import sys, runpy; sys.argv = ['scripts/list.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('scripts/list.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, what], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1500, "1.50k"), (999_499, "999k"), (999_500, "1.00M"), (8_030_261_248, "8.03B"), (10**12, "1.00T")],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert listing.short_count(number) == text
