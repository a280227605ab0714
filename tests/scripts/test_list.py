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


def test_flavors_are_those_of_the_registry() -> None:
    listed: Any = listing.list_flavors(None)
    assert {(row["model"], row["flavor"]) for row in listed} == {
        (name, flavor) for name in families for flavor in families[name].flavors
    }
    args: Any = get_args("llama3", "8B")
    row = next(row for row in listed if (row["model"], row["flavor"]) == ("llama3", "8B"))
    assert (row["layers"], row["longest_row"]) == (args.n_layers, args.max_seq_len)


@pytest.mark.parametrize(
    ("name", "flavor"), [("llama3", "debugmodel"), ("qwen3", "debugmodel_moe"), ("gpt_oss", "debugmodel")]
)
def test_counts_are_the_models_own(name: str, flavor: str) -> None:
    args: Any = get_args(name, flavor)
    with torch.device("meta"):
        model = families[name].load().model_cls(args)
    (row,) = [row for row in listing.list_flavors(name) if row["flavor"] == flavor]
    held = {name: parameter.numel() for name, parameter in model.named_parameters()}
    idle = 0
    if args.experts is not None:
        of_experts = sum(count for name, count in held.items() if ".experts." in name)
        idle = of_experts // args.experts.count * (args.experts.count - args.experts.per_token)
    assert (row["parameters"], row["active"]) == (sum(held.values()), sum(held.values()) - idle)


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
    assert {*found} >= {"llama3", "qwen3", "deepseek_v3"}


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
    assert done.stderr.startswith(
        "error: 'lama3': no such model family; there are deepseek_v3, gemma3, gpt_oss, llama3,"
    )
    assert done.stderr.endswith("; did you mean llama3?\n")


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
