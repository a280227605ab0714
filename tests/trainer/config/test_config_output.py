"""What is printed and written of a configuration: for reading, for loading again, for the docs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomli

from components.config.job_config import JobConfig
from components.config.schema import schema_of
from trainer.config.docs import json_schema
from trainer.config.help import help_text
from trainer.config.inactive import INACTIVE, inactive
from trainer.config.load import load_job
from trainer.config.output import print_config, to_toml
from trainer.config.support import UNSUPPORTED

ROOT = Path(__file__).resolve().parents[3]
NAMES = schema_of(JobConfig).names
SHIPPED = sorted(ROOT.glob("models/*/train_configs/*.toml"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_print_config() -> None:
    Path("a.toml").write_text(
        "[checkpoint]\ninterval = 5\n[quantize.linear.float8]\nfilter_fqns = ['output']\n"
        "[model]\nconverters = ['float8']\n"
    )
    resolved = load_job(["--job.config_file=a.toml", "--model.converters=", "--compile.backend=eager"], {})
    lines = print_config(resolved).splitlines()
    shown = [re.sub(" {2,}", "  ", line) for line in lines]
    assert "interval = 5  # a.toml:2 (inactive: checkpoint.enable is false)" in shown
    assert 'backend = "eager"  # --compile.backend=eager (inactive: compile.enable is false)' in shown
    assert 'filter_fqns = ["output"]  # a.toml:4 (inactive: converter quantize.linear.float8 is not listed)' in shown
    assert "converters = []  # --model.converters=" in shown
    assert "keep_latest_k = 10  # default" in shown
    assert shown[shown.index("[quantize.linear.float8]") - 1] == ""
    assert sum(" = " in line for line in lines) == len(NAMES)


def test_print_config_begins_with_the_notes() -> None:
    text = print_config(load_job(["--model.converters=float8"], {}))
    assert text.splitlines()[0] == (
        '# --model.converters=float8: model.converters: "float8" is an older name of "quantize.linear.float8"'
    )


def test_tables_name_keys_that_exist() -> None:
    sections = {".".join(path) + "." for path in schema_of(JobConfig).sections}
    patterns = {pattern for entry in INACTIVE for pattern in entry.keys}
    lost = [
        p for p in patterns if p not in NAMES | sections and not any(n.startswith(p) for n in NAMES if p[-1] == "_")
    ]
    assert lost == []
    assert [entry.key for entry in UNSUPPORTED if entry.key not in NAMES] == []


@pytest.mark.parametrize(
    ("argv", "key", "why"),
    [
        ([], "checkpoint.enable", None),
        ([], "checkpoint.folder", "checkpoint.enable is false"),
        (["--checkpoint.enable"], "checkpoint.folder", None),
        (
            ["--checkpoint.enable"],
            "checkpoint.export_dtype",
            "no save is model-only and nothing is exported: checkpoint.last_save_model_only is false",
        ),
        ([], "validation.dataloader.num_workers", "validation.enable is false"),
        ([], "parallelism.pipeline_parallel_degree", None),
        ([], "parallelism.pipeline_parallel_schedule_csv", "parallelism.pipeline_parallel_degree is 1"),
        ([], "training.steps", None),
        (["--model.tokenizer_path=x"], "model.hf_assets_path", "model.tokenizer_path is set"),
        ([], "activation_checkpoint.memory_budget", "mode is not memory_budget"),
        (
            ["--lr_scheduler.decay_ratio=0"],
            "lr_scheduler.min_lr_factor",
            "lr_scheduler.decay_ratio is 0: nothing decays",
        ),
    ],
)
def test_inactive(argv: list[str], key: str, why: str | None) -> None:
    assert inactive(load_job(argv, {}).job, key) == why


def test_resolved_toml_loads_back_to_the_same_job() -> None:
    argv = [
        "--training.max_norm=inf",
        "--parallelism.context_parallel_load_balancer=none",
        "--parallelism.pipeline_parallel_schedule_csv=none",
        "--optimizer.parameter_groups=[{pattern='norm|bias', weight_decay=0.0}, {pattern='w\\\\d'}]",
        "--parallelism.module_fqns_per_model_part=[['a'],['b','c']]",
        '--job.description="quoted" \\ and ünïcode\n',
        "--debug.seed=3",
        "--quantize.grouped_mm.mx.fqns=experts",
    ]
    job = load_job(argv, {}).job
    Path("resolved.toml").write_text(to_toml(job), encoding="utf-8")
    again = load_job(["--job.config_file=resolved.toml"], {}).job
    assert replace(again, job=replace(again.job, config_file=None)) == job
    assert to_toml(again) == to_toml(job)


def test_help_names_every_key() -> None:
    text = help_text()
    assert {name for name in NAMES if f"  --{name}=" not in text} == set()
    assert "\033" not in text  # not a terminal
    assert '  --activation_checkpoint.mode="selective"  (one of "selective", "full", "memory_budget", "none")\n' in text
    assert max(map(len, text.splitlines())) <= 160


def test_schema_has_every_key_and_no_more() -> None:
    schema = json.loads(json_schema())

    def keys(node: dict[str, dict], prefix: str) -> set[str]:
        found = set()
        for name, entry in node["properties"].items():
            if "$ref" in entry:
                found |= keys(schema["definitions"][entry["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                found.add(f"{prefix}{name}")
            assert entry["description"]
        assert node["additionalProperties"] is False
        return found

    assert keys(schema, "") == NAMES | {"extends"}
    steps = schema["definitions"]["Training"]["properties"]["steps"]
    assert steps == {"type": "integer", "minimum": 1, "default": 10000, "description": "Optimizer steps of the job."}


def test_generated_files_are_fresh() -> None:
    command = [sys.executable, ROOT / "scripts/generate_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("source", SHIPPED, ids=lambda path: f"{path.parent.parent.name}_{path.stem}")
def test_golden_configs(source: Path) -> None:
    golden = ROOT / f"tests/golden/configs/{source.parent.parent.name}_{source.name}"
    resolved = load_job([f"--job.config_file={source}"], {})
    assert tomli.loads(golden.read_text(encoding="utf-8")) == tomli.loads(to_toml(resolved.job))
    assert resolved.notes == []
