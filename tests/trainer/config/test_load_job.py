"""Where values come from: every form of argument, the precedence of the sources, and what provenance says of it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from components.config.job_config import JobConfig
from components.config.schema import get
from components.runtime.errors import ConfigError
from trainer.config.load import load_job


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--training.steps=5"], "training.steps", 5),
        (["--training.steps", "5"], "training.steps", 5),
        (["--training.seq-len=64"], "training.seq_len", 64),
        (["--lr-scheduler.warmup-steps", "3"], "lr_scheduler.warmup_steps", 3),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--training.steps=5", "--training.steps=6"], "training.steps", 6),
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable=true"], "compile.enable", True),
        (["--compile.enable", "true", "--debug.seed=1"], "compile.enable", True),
        (["--compile.enable=True"], "compile.enable", True),
        (["--data.shuffle=false"], "data.shuffle", False),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.no_shuffle"], "data.shuffle", False),
        (["--data.no-shuffle"], "data.shuffle", False),
        (["--training.dataloader.no-pin-memory"], "training.dataloader.pin_memory", False),
        (["--training.dataloader.num_workers=2"], "training.dataloader.num_workers", 2),
        (["--quantize.linear.float8.recipe_name=rowwise"], "quantize.linear.float8.recipe_name", "rowwise"),
        (["--quantize.linear.float8.filter_fqns=a,b"], "quantize.linear.float8.filter_fqns", ["a", "b"]),
        (["--compile.components=loss"], "compile.components", ["loss"]),
        (["--compile.components", "model,loss"], "compile.components", ["model", "loss"]),
        (['--compile.components=["loss"]'], "compile.components", ["loss"]),
        (["--model.converters="], "model.converters", []),
        (["--lr_scheduler.total_steps=none"], "lr_scheduler.total_steps", None),
        (["--parallelism.context_parallel_load_balancer=None"], "parallelism.context_parallel_load_balancer", None),
        (["--activation_checkpoint.mode=none"], "activation_checkpoint.mode", "none"),
        (["--training.max_norm=inf"], "training.max_norm", float("inf")),
        (["--optimizer.lr=1"], "optimizer.lr", 1.0),
        (["--job.description=a=b --c"], "job.description", "a=b --c"),
        (
            ['--parallelism.module_fqns_per_model_part=[["a"], ["b"]]'],
            "parallelism.module_fqns_per_model_part",
            [["a"], ["b"]],
        ),
    ],
)
def test_forms_of_arguments(argv: list[str], key: str, value: object) -> None:
    found = get(load_job(argv, {}).job, tuple(key.split(".")))
    assert (found, type(found)) == (value, type(value))


def test_no_source_gives_the_defaults() -> None:
    resolved = load_job([], {})
    assert resolved.job == JobConfig()
    assert set(resolved.provenance.values()) == {"default"}
    assert resolved.provenance["training.dataloader.num_workers"] == "default"


def test_precedence_and_provenance() -> None:
    Path("base").mkdir()
    Path("base/grand.toml").write_text("[training]\nsteps = 1\nseq_len = 16\n[optimizer]\nlr = 0.5\n")
    Path("base/parent.toml").write_text("extends = 'grand.toml'\n[training]\nsteps = 2\nlocal_batch_size = 3\n")
    Path("job.toml").write_text("extends = 'base/parent.toml'\n\n[training]\nsteps = 4\n")
    resolved = load_job(["--job.config_file=job.toml", "--training.seq-len=32", "--debug.seed", "7"], {})
    training = resolved.job.training
    assert (training.steps, training.local_batch_size, training.seq_len) == (4, 3, 32)
    assert (resolved.job.optimizer.lr, resolved.job.debug.seed) == (0.5, 7)
    shown = ("training.steps", "training.local_batch_size", "training.seq_len", "optimizer.lr", "debug.seed")
    assert [resolved.provenance[key] for key in shown] == [
        "job.toml:4",
        "base/parent.toml:4",
        "--training.seq-len=32",
        "base/grand.toml:5",
        "--debug.seed=7",
    ]
    assert resolved.provenance["job.config_file"] == "--job.config_file=job.toml"
    assert resolved.provenance["training.max_norm"] == "default"


def test_lists_are_replaced_and_tables_are_merged() -> None:
    Path("base.toml").write_text("[validation.dataloader]\nnum_workers = 2\n[model]\nconverters = ['a', 'b']\n")
    Path("job.toml").write_text(
        "extends = 'base.toml'\n[validation]\ndataloader = { pin_memory = true }\n[model]\nconverters = ['c']\n"
    )
    job = load_job(["--job.config-file", "job.toml"], {}).job
    assert (job.validation.dataloader.num_workers, job.validation.dataloader.pin_memory) == (2, True)
    assert job.model.converters == ["c"]


def test_environment() -> None:
    Path("a.toml").write_text("[training]\nsteps = 1\n[comm]\nmode = 'default'\n")
    Path("b.toml").write_text("[training]\nsteps = 2\n")
    environ = {"CONFIG_FILE": "a.toml", "COMM_MODE": "fake_backend"}
    resolved = load_job([], environ)
    assert (resolved.job.training.steps, resolved.job.comm.mode) == (1, "fake_backend")
    assert resolved.provenance["job.config_file"] == "CONFIG_FILE=a.toml"
    assert resolved.provenance["comm.mode"] == "COMM_MODE=fake_backend"
    resolved = load_job(["--job.config_file=b.toml", "--comm.mode=default"], environ)
    assert (resolved.job.training.steps, resolved.job.comm.mode) == (2, "default")
    assert load_job([], {"CONFIG_FILE": ""}).job == JobConfig()


def test_config_file_inside_a_file_is_told() -> None:
    Path("a.toml").write_text("[job]\nconfig_file = 'other.toml'\n")
    resolved = load_job(["--job.config_file=a.toml"], {})
    assert resolved.job.job.config_file == "a.toml"
    assert resolved.notes == [
        'a.toml:2: job.config_file: has no effect inside a file; to build on another file write extends = "..."'
    ]


def test_parameter_groups() -> None:
    Path("a.toml").write_text(
        "[[optimizer.parameter_groups]]\npattern = 'norm|bias'\nweight_decay = 0\n"
        "[[optimizer.parameter_groups]]\npattern = 'wq'\nlr_factor = 2\n"
    )
    resolved = load_job(["--job.config_file=a.toml"], {})
    first, second = resolved.job.optimizer.parameter_groups
    assert (first.pattern, first.weight_decay, first.lr_factor) == ("norm|bias", 0.0, 1.0)
    assert (second.pattern, second.weight_decay, second.lr_factor) == ("wq", None, 2.0)
    assert resolved.provenance["optimizer.parameter_groups"] == "a.toml:1"


CUSTOM = """
from dataclasses import dataclass, field

@dataclass
class Mine:
    mood: str = "good"
    betas: tuple[float, float] = (0.9, 0.95)

@dataclass
class Training:
    steps: int = 500
    my_steps: int = 10

@dataclass
class JobConfig:
    mine: Mine = field(default_factory=Mine)
    training: Training = field(default_factory=Training)
"""


@pytest.mark.parametrize("key", ["job.custom_config_module", "experimental.custom_args_module"])
@pytest.mark.shows("job.custom_config_module", "experimental.custom_args_module")
def test_custom_sections(key: str) -> None:
    name = key.replace(".", "_")
    Path(f"{name}.py").write_text(CUSTOM)
    Path("a.toml").write_text("[mine]\nbetas = [0.5, 0.6]\n[training]\nmy_steps = 3\n")
    resolved = load_job(["--job.config_file=a.toml", f"--{key}={name}", "--mine.mood=bad"], {})
    job: Any = resolved.job
    assert (job.mine.mood, job.mine.betas) == ("bad", (0.5, 0.6))
    assert (job.training.my_steps, job.training.steps, job.training.seq_len) == (3, 500, 2048)
    assert isinstance(job, JobConfig)
    assert resolved.provenance["mine.mood"] == "--mine.mood=bad"
    assert resolved.notes == [f"--{key}={name}: {key} = {name!r}: imported, its sections and keys are added"]


def test_custom_keys_are_checked() -> None:
    Path("checked_config.py").write_text(CUSTOM)
    Path("a.toml").write_text("[job]\ncustom_config_module = 'checked_config'\n[mine]\nmod = 1\nbetas = [1]\n")
    with pytest.raises(ConfigError) as caught:
        load_job(["--job.config_file=a.toml", "--training.my_steps=x"], {})
    assert caught.value.problems == (
        "a.toml:4: mine.mod: unknown key; did you mean mine.mood?",
        "a.toml:5: mine.betas = [1]: must be a value of type tuple[float, float]",
        "--training.my_steps=x: must be an integer",
    )


def test_torchtitans_modules_are_not_imported() -> None:
    load_job(["--job.custom_config_module=torchtitan.experiments.x.job_config"], {})
    assert not any(name.startswith("torchtitan") for name in sys.modules)


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbf[training]\nsteps = 7\n")
    resolved = load_job([f"--job.config_file={file}"], {})
    assert (resolved.job.training.steps, resolved.provenance["training.steps"]) == (7, f"{file}:2")
