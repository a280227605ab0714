"""`python -m trainer check` as a process: its answer, its exit code, and that it needs no torch."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from models.train_spec import get_args
from trainer.check import run_check

ROOT = Path(__file__).resolve().parents[2]


def check(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CONFIG_FILE", "NGPU", "NNODES", "COMM_MODE")}
    command = [sys.executable, "-m", "trainer", "check", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment | environ, capture_output=True, text=True, check=False)


def test_summary(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[job]\ndescription = 'a small one'\n[training]\nglobal_batch_size = 64\n")
    done = check(str(tmp_path / "a.toml"), "--world-size=4", "--training.seq-len", "128", "--training.steps=1000")
    assert done.stdout == (
        "job              a small one\n"
        "model            llama3 debugmodel, 6,163,712 parameters\n"
        "layout           4 ranks: 1 replicated × 4 sharded\n"
        "global batch     64 rows: 8 local × 4 data-parallel × 2 accumulated\n"
        "tokens per step  8,192\n"
        "steps            1,000: 8,192,000 tokens\n"
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_parameters_are_those_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    """Modules of multi-token prediction that the job adds or leaves out are counted as it says."""
    args = get_args("deepseek_v3", "debugmodel")
    for layers in (0, 1, 3):
        assert run_check(["--model.name=deepseek_v3", f"--model.mtp_layers={layers}"], {}) == 0
        count = replace(cast(Any, args), mtp_layers=layers).parameter_count()
        assert f"model            deepseek_v3 debugmodel, {count:,} parameters\n" in capsys.readouterr().out


def test_world_size_from_the_environment() -> None:
    assert (
        "layout           6 ranks: 2 replicated × 3 sharded\n"
        in check("--parallelism.data_parallel_replicate_degree=2", NGPU="3", NNODES="2").stdout
    )


def test_experts_are_no_further_ranks() -> None:
    degrees = {"tensor": 2, "context": 2, "expert": 4}
    found = check(
        "--model.name=qwen3",
        "--model.flavor=debugmodel_moe",
        "--world-size=8",
        *(f"--parallelism.{name}_parallel_degree={degree}" for name, degree in degrees.items()),
    )
    layout = "1 replicated × 2 sharded × 2 context × 2 tensor; experts 2 sharded × 4 expert × 1 expert tensor"
    assert f"layout           8 ranks: {layout}\n" in found.stdout
    assert (found.stderr, found.returncode) == ("", 0)


def test_custom_import_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "explodes.py").write_text("raise SystemExit('imported')\n")
    done = check("--experimental.custom_import=explodes", "--model.name=mine", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0
    assert (
        done.stdout.splitlines()[1] == "model            mine debugmodel, not checked: it is registered by other code"
    )
    assert done.stdout.splitlines()[-1] == (
        'note             experimental.custom_import = "explodes": names from explodes are checked when it is imported'
    )


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (
            ["no_such.toml"],
            {},
            "error: no_such.toml: cannot be read: No such file or directory; check the path and the current folder\n",
        ),
        (
            ["--training.stepss=5", "--training.seq_len=0"],
            {},
            "error: 2 problems in the configuration\n"
            "  --training.stepss=5: unknown key; did you mean training.steps?\n"
            "  --training.seq_len=0: must be an integer of at least 1\n",
        ),
        (["--world-size=0"], {}, "error: --world-size=0: must be an integer of at least 1\n"),
        ([], {"NGPU": "two"}, "error: NGPU=two: must be an integer of at least 1\n"),
    ],
)
def test_bad_input(argv: list[str], environ: dict[str, str], message: str) -> None:
    done = check(*argv, **environ)
    assert (done.stdout, done.stderr, done.returncode) == ("", message, 2)


def test_print_config() -> None:
    lines = check("--print-config", "--training.steps=300").stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("steps = ")] == [
        ["steps", "=", "300", "#", "--training.steps=300"],
        ["steps", "=", "-1", "#", "default"],
    ]
    assert lines[-1] == "steps            300: 4,915,200 tokens"


@pytest.mark.parametrize("command", ["check", "--help"])
def test_needs_no_torch(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", command],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "trainer.command" in imported
    assert imported & {"torch", "numpy", "datasets", "tokenizers", "triton", "torchao", "transformers"} == set()


def test_is_fast() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        check("--training.stepss=5")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.5  # the best of three: other work on the machine only adds
