"""Files as TorchTitan v0.2.2's users have them: their keys and values, in our own words, must load unchanged."""

from pathlib import Path

import pytest

from components.mesh.degrees import resolve_degrees
from trainer.config.load import ResolvedJob, load_job
from trainer.config.names import find_model
from trainer.config.validate import validate

DEBUG_MODEL = """
[job]
dump_folder = "./outputs"
description = "Llama 3 debug training"
print_config = false

[profiling]
enable_profiling = false
save_traces_folder = "profile_trace"
profile_freq = 10
enable_memory_snapshot = false
save_memory_snapshot_folder = "memory_snapshot"

[metrics]
log_freq = 1
disable_color_printing = false
enable_tensorboard = false
save_tb_folder = "tb"
enable_wandb = false

[model]
name = "llama3"
flavor = "debugmodel"
hf_assets_path = "./tests/assets/tokenizer"

[optimizer]
name = "AdamW"
lr = 8e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 2
decay_ratio = 0.8
decay_type = "linear"
min_lr_factor = 0.0

[training]
local_batch_size = 8
seq_len = 2048
max_norm = 1.0
steps = 10
dataset = "c4_test"

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = 1
enable_async_tensor_parallel = false
pipeline_parallel_degree = 1
context_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 10
last_save_model_only = false
export_dtype = "float32"
async_mode = "disabled"

[activation_checkpoint]
mode = "selective"
selective_ac_option = "2"

[compile]
enable=false
components = ["model", "loss"]

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 5
steps = 10
"""

LLAMA_405B = """
[job]
dump_folder = "./outputs"
description = "Llama 3 405B training"

[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100

[metrics]
log_freq = 10
enable_tensorboard = true
save_tb_folder = "tb"

[model]
name = "llama3"
flavor = "405B"
hf_assets_path = "./assets/hf/Llama-3.1-405B"
converters = ["float8"]

[optimizer]
name = "AdamW"
lr = 8e-5
eps = 1e-8

[lr_scheduler]
warmup_steps = 600

[training]
local_batch_size = 2
seq_len = 8192
max_norm = 1.0
steps = 3000
dataset = "c4"

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 8
enable_async_tensor_parallel = true
pipeline_parallel_degree = 1
context_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled"

[activation_checkpoint]
mode = "full"

[compile]
enable=true
components = ["model", "loss"]

[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
steps = 1200
"""

DEEPSEEK_671B = """
[job]
dump_folder = "./outputs"
description = "DeepSeek-V3 671B model training"
print_config = false

[model]
name = "deepseek_v3"
flavor = "671B"
hf_assets_path = "./assets/hf/DeepSeek-V3.1-Base"

[optimizer]
name = "AdamW"
lr = 2.2e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 2_000
decay_ratio = 0.8
decay_type = "cosine"
min_lr_factor = 0.1

[training]
local_batch_size = 4
seq_len = 4096
max_norm = 1.0
steps = 10_000
dataset = "c4"

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = 8
enable_async_tensor_parallel = false
pipeline_parallel_degree = 8
pipeline_parallel_schedule = "Interleaved1F1B"
expert_parallel_degree = 32
expert_tensor_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled"
initial_load_in_hf = true

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = true
components = ["loss"]

[quantize.linear.float8]
filter_fqns = ["output", "router.gate"]

[quantize.grouped_mm.float8]
fqns = ["experts"]
"""

QWEN_MOE = """
[job]
dump_folder = "./outputs"
description = "Qwen 3 debug training"
print_config = false
custom_config_module = "torchtitan.experiments.simple_fsdp.job_config"

[model]
name = "qwen3"
flavor = "debugmodel_moe"
hf_assets_path = "./tests/assets/tokenizer"

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 2

[training]
local_batch_size = 4
seq_len = 4096
max_norm = 1.0
steps = 10
dataset = "c4_test"

[training.dataloader]
num_workers = 2
pin_memory = true

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = 1
context_parallel_degree = 1
expert_parallel_degree = 1
expert_tensor_parallel_degree = 1

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[debug]
moe_force_load_balance = true
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str) -> ResolvedJob:
    Path("titan.toml").write_text(text)
    return load_job(["--job.config_file=titan.toml"], {})


def problems(text: str, ranks: int) -> list[str]:
    job = load(text).job
    args, found = find_model(job)
    return found + validate(job, ranks, args)


def test_debug_model() -> None:
    resolved = load(DEBUG_MODEL)
    assert (resolved.job.training.steps, resolved.job.quantize.linear.float8.filter_fqns) == (10, ["output"])
    assert resolved.notes == []
    assert problems(DEBUG_MODEL, 4) == []


def test_alias_of_a_converter() -> None:
    resolved = load(LLAMA_405B)
    assert resolved.job.model.converters == ["quantize.linear.float8"]
    assert resolved.notes == ['titan.toml:20: model.converters: "float8" is an older name of "quantize.linear.float8"']


def test_405b_is_refused_only_for_what_is_live() -> None:
    assert problems(LLAMA_405B, 128) == [
        'model.converters = ["quantize.linear.float8"]: not yet supported: model converters are not there yet;'
        " train without them: converters = []",
    ]


def test_deepseek_loads_and_its_layout_fits() -> None:
    job = load(DEEPSEEK_671B).job
    degrees = resolve_degrees(job.parallelism, 1024)
    assert (degrees.dp_shard, degrees.tp, degrees.pp, degrees.ep) == (16, 8, 8, 32)
    assert job.quantize.grouped_mm.float8.fqns == ["experts"]


def test_torchtitans_own_config_modules_are_built_in() -> None:
    resolved = load(QWEN_MOE)
    assert resolved.job.training.dataloader.num_workers == 2
    assert resolved.notes == [
        "titan.toml:6: job.custom_config_module = 'torchtitan.experiments.simple_fsdp.job_config':"
        " the built-in sections stand for it; nothing was imported"
    ]
