"""No key of a job is accepted and ignored: each is shown by a test, or refused, or a setting of what is refused.

A test shows a key by the marker `shows`: `@pytest.mark.shows("training.seq_len")`, or as a mark of one of its
parameters. Where a key stands in none of the tables below, a test is missing; where it stands in two, a line is stale.
Keys of tables in a list are shown where such tables are first a key's: `data.sources.weight`, and by
`validation.sources` no more than that it takes the same.
"""

import ast
import dataclasses
from collections import Counter
from pathlib import Path
from typing import cast, get_args

import pytest

from components.config.annotations import single
from components.config.job_config import JobConfig
from components.config.schema import schema_of
from tests.trainer.runs import ROOT
from trainer.config.inactive import inactive
from trainer.config.load import load_job
from trainer.config.names import find_model
from trainer.config.support import UNSUPPORTED
from trainer.config.validate import validate


def keys_of_tables() -> frozenset[str]:
    """`data.sources.weight` and so on: keys of the tables that lists hold, of each kind of table once."""
    found: dict[type, str] = {}
    for key in schema_of(JobConfig).keys.values():
        for item in get_args(single(key.type)):
            if dataclasses.is_dataclass(item):
                found.setdefault(cast(type, item), key.name)
    return frozenset(f"{name}.{field.name}" for table, name in found.items() for field in dataclasses.fields(table))


KEYS = schema_of(JobConfig).names | keys_of_tables()

FLOAT8, MX = "--model.converters=quantize.linear.float8", "--model.converters=quantize.linear.mx"
FLOAT8_EXPERTS = "--model.converters=quantize.grouped_mm.float8"
MX_EXPERTS = "--model.converters=quantize.grouped_mm.mx"
SAVES = "--checkpoint.enable"
EXPERTS = ("--model.name=qwen3", "--model.flavor=debugmodel_moe")

REFUSED = {
    "model.converters": (
        (FLOAT8,),
        '["quantize.linear.float8"]: not yet supported: model converters are not there yet; train without them:'
        " converters = []",
    ),
    "parallelism.expert_parallel_comm_backend": (
        (*EXPERTS, "--parallelism.expert_parallel_degree=2", "--parallelism.expert_parallel_comm_backend=deepep"),
        '"deepep": not yet supported: DeepEP is a CUDA library of its own, whose kernels nothing here could be tested'
        ' with; set it to "standard"',
    ),
    "fault_tolerance.enable": (
        ("--fault_tolerance.enable",),
        "true: not yet supported: replica groups that may fail are not there yet; set it to false and resume from"
        " checkpoints",
    ),
    "memory_estimation.enable": (
        ("--memory_estimation.enable",),
        "true: not yet supported: the dry run takes its place: COMM_MODE=fake_backend ./run_train.sh; set it to false",
    ),
}
"""Key → arguments that make it live, and how it is refused then."""

FAULTS = ("--fault_tolerance.enable",)
SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        f"quantize.linear.float8.{name}": ((FLOAT8,), "converter quantize.linear.float8 is not listed")
        for name in (
            "enable_fsdp_float8_all_gather",
            "precompute_float8_dynamic_scale_for_fsdp",
            "recipe_name",
            "filter_fqns",
            "emulate",
        )
    },
    **{
        f"quantize.linear.mx.{name}": ((MX,), "converter quantize.linear.mx is not listed")
        for name in ("mxfp8_dim1_cast_kernel_choice", "recipe_name", "filter_fqns")
    },
    "quantize.grouped_mm.float8.fqns": ((FLOAT8_EXPERTS,), "converter quantize.grouped_mm.float8 is not listed"),
    "quantize.grouped_mm.mx.recipe_name": ((MX_EXPERTS,), "converter quantize.grouped_mm.mx is not listed"),
    "quantize.grouped_mm.mx.fqns": ((MX_EXPERTS,), "converter quantize.grouped_mm.mx is not listed"),
    "model.print_after_conversion": ((FLOAT8,), "model.converters is empty"),
    "checkpoint.enable_ft_dataloader_checkpoints": ((SAVES, *FAULTS), "checkpoint.enable is false"),
    **{
        f"fault_tolerance.{name}": (FAULTS, "fault_tolerance.enable is false")
        for name in (
            "process_group",
            "process_group_timeout_ms",
            "replica_id",
            "group_size",
            "min_replica_size",
            "semi_sync_method",
            "sync_steps",
            "should_quantize",
            "fragment_sync_delay",
            "fragment_update_alpha",
            "module_fqns_per_model_fragment",
            "num_fragments",
        )
    },
    "memory_estimation.disable_fake_mode": (("--memory_estimation.enable",), "memory_estimation.enable is false"),
}
"""Key → arguments that switch on what it is a setting of, and why it is inactive without them."""

NEVER = {
    "training.dataloader.persistent_workers": "training is one pass from the first step to the last, epochs included",
    "parallelism.pipeline_parallel_expert_parallel_overlap": (
        "no schedule overlaps the dispatch of one microbatch's experts with another's compute"
    ),
}
"""Keys that TorchTitan's files may set and that can do nothing here, and what is said of them."""


def claims(path: Path) -> list[str]:
    """The keys that a test file's `shows` marks name. All must be written out."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) in ("shows", "pytest.mark.shows")]
    return [ast.literal_eval(argument) for mark in marks for argument in mark.args]


def shown() -> dict[str, str]:
    """Every key that a test claims to show → one of the files that do."""
    return {key: str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") for key in claims(path)}


def problems(arguments: tuple[str, ...], ranks: int = 1) -> list[str]:
    job = load_job(arguments, {}).job
    args, found = find_model(job)
    return found + validate(job, ranks, args)


def test_every_key_is_in_one_place() -> None:
    places = Counter([*shown(), *REFUSED, *SETTINGS, *NEVER])
    assert sorted(KEYS - {*places}) == [], "no test shows what these do: mark one with @pytest.mark.shows"
    assert {key: shown().get(key) for key in {*places} - KEYS} == {}, "these are no keys"
    assert {key: shown().get(key) for key, count in places.items() if count > 1} == {}, "these are in two places"


def test_every_refusal_is_tested() -> None:
    assert sorted(REFUSED) == sorted(entry.key for entry in UNSUPPORTED)
    assert all(not entry.live(JobConfig()) for entry in UNSUPPORTED)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_there_is_refused(key: str) -> None:
    arguments, message = REFUSED[key]
    assert f"{key} = {message}" in problems(arguments)
    assert problems(()) == []


def test_degrees_of_experts_need_experts() -> None:
    expert, tensor = "parallelism.expert_parallel_degree", "parallelism.expert_tensor_parallel_degree"
    assert problems((f"--{expert}=2",), 2) == [f"{expert} = 2: this model has no experts; set it to 1"]
    assert problems((f"--{tensor}=2",), 2) == [
        f"{tensor} = 2: is neither 1 nor the tensor-parallel degree 1: set it to 1",
        f"{tensor} = 2: this model has no experts; set it to 1",
    ]
    assert problems((*EXPERTS, f"--{expert}=2"), 2) == []


@pytest.mark.parametrize("key", ["moe.balance_coefficient", "moe.bias_rate", "debug.moe_force_load_balance"])
def test_keys_of_experts_are_inactive_without_experts(key: str) -> None:
    assert inactive(JobConfig(), key) == "the model has no experts"
    assert inactive(load_job(("--model.name=qwen3",), {}).job, key) == "the model has no experts"
    assert inactive(load_job(EXPERTS, {}).job, key) is None
    assert inactive(load_job(("--model.name=ours", "--experimental.custom_import=ours"), {}).job, key) is None


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_of_what_is_not_there_are_inactive_or_refused_with_it(key: str) -> None:
    arguments, why = SETTINGS[key]
    assert inactive(JobConfig(), key) == why
    assert inactive(load_job(arguments, {}).job, key) is None
    assert problems(arguments, 2) != []


@pytest.mark.parametrize("key", NEVER)
def test_what_can_do_nothing_is_said(key: str) -> None:
    assert inactive(JobConfig(), key) == NEVER[key]


PP = "--parallelism.pipeline_parallel_degree=2"
PIPELINE = (
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
    "parallelism.pipeline_parallel_layers_per_stage",
    "parallelism.pipeline_parallel_schedule",
    "parallelism.pipeline_parallel_schedule_csv",
    "parallelism.pipeline_parallel_microbatch_size",
    "parallelism.module_fqns_per_model_part",
)
BY_HAND = "parallelism.module_fqns_per_model_part decides"
BY_FILE = "parallelism.pipeline_parallel_schedule_csv decides"
SYNTHETIC = 'training.dataset is "synthetic", whose rows are drawn by their number, without end'


@pytest.mark.parametrize(
    ("arguments", "key", "why"),
    [
        (("--training.dataset=synthetic",), "data.streams", SYNTHETIC),
        (("--training.dataset=synthetic",), "data.shuffle_window", SYNTHETIC),
        (("--training.dataset=synthetic",), "data.document_mask", None),
        *(((), key, "parallelism.pipeline_parallel_degree is 1") for key in PIPELINE),
        *(((PP,), key, None) for key in PIPELINE),
        *(((PP, "--parallelism.module_fqns_per_model_part=[[]]"), key, BY_HAND) for key in PIPELINE[:3]),
        ((PP, "--parallelism.pipeline_parallel_schedule_csv=a.csv"), PIPELINE[3], BY_FILE),
        ((), "parallelism.context_parallel_load_balancer", "parallelism.context_parallel_degree is 1"),
        ((), "parallelism.context_parallel_rotate_method", "parallelism.context_parallel_degree is 1"),
        (("--parallelism.context_parallel_degree=2",), "parallelism.context_parallel_rotate_method", None),
        (("--training.gc_debug",), "training.gc_freq", "training.gc_debug collects at every step"),
        (("--comm.trace_buf_size=0",), "comm.save_traces_folder", "comm.trace_buf_size is 0: nothing is recorded"),
        ((SAVES, "--checkpoint.load_only"), "checkpoint.last_save_model_only", "checkpoint.load_only saves nothing"),
        ((SAVES, "--checkpoint.load_only"), "checkpoint.exclude_from_loading", None),
        ((), "parallelism.disable_loss_parallel", "parallelism.tensor_parallel_degree is 1"),
        ((), "parallelism.enable_async_tensor_parallel", "parallelism.tensor_parallel_degree is 1"),
        (("--parallelism.data_parallel_shard_degree=1",), "parallelism.fsdp_reshard_after_forward", None),
    ],
)
def test_keys_that_others_make_idle(arguments: tuple[str, ...], key: str, why: str | None) -> None:
    assert inactive(load_job(arguments, {}).job, key) == why
