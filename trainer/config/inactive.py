"""The table of keys that do nothing given the rest of the job. `--print-config` shows those of them that were set.

They are accepted: a TOML that keeps its checkpoint settings while saving is switched off is no mistake.
"""

from collections.abc import Callable
from dataclasses import dataclass

from components.config.job_config import JobConfig
from trainer.config.names import find_model
from trainer.config.support import CONVERTERS

Predicate = Callable[[JobConfig], bool]


@dataclass(frozen=True)
class Inactive:
    """Keys that do nothing while `idle` says so. A key ending in `.` or in `_` stands for all that begin so."""

    keys: tuple[str, ...]
    idle: Predicate
    why: str
    """The reason, as the end of "inactive: …"."""


def _without(converter: str) -> Inactive:
    return Inactive(
        (f"{converter}.",), lambda job: converter not in job.model.converters, f"converter {converter} is not listed"
    )


def _has_no_experts(job: JobConfig) -> bool:
    """False where only code that is not imported knows it. A family with experts has `experts` in its arguments."""
    args, _ = find_model(job)
    return args is not None and not getattr(args, "experts", None)


def _looks_not_ahead(job: JobConfig) -> bool:
    """False where only code that is not imported knows it. A family that can has `mtp_layers` in its arguments."""
    args, _ = find_model(job)
    own = getattr(args, "mtp_layers", 0) if job.model.mtp_layers is None else job.model.mtp_layers
    return not own and (args is not None or job.model.mtp_layers is not None)


def _mode_is_not(*modes: str) -> Predicate:
    return lambda job: job.activation_checkpoint.mode not in modes


def _by_op(job: JobConfig) -> bool:
    recompute = job.activation_checkpoint
    return recompute.mode == "selective" and recompute.selective_ac_option == "op"


def _exports(job: JobConfig) -> bool:
    return job.checkpoint.last_save_in_hf or job.checkpoint.export_interval > 0


INACTIVE = (
    *(_without(name) for name in CONVERTERS),
    Inactive(
        ("model.hf_assets_path",), lambda job: job.model.tokenizer_path is not None, "model.tokenizer_path is set"
    ),
    Inactive(("model.print_after_conversion",), lambda job: not job.model.converters, "model.converters is empty"),
    Inactive(("checkpoint.",), lambda job: not job.checkpoint.enable, "checkpoint.enable is false"),
    Inactive(
        tuple(
            f"checkpoint.{k}"
            for k in (
                "interval",
                "keep_latest_k",
                "enable_first_step_checkpoint",
                "last_save_",
                "export_",
                "async_mode",
                "max_failed_saves",
            )
        ),
        lambda job: job.checkpoint.load_only,
        "checkpoint.load_only saves nothing",
    ),
    Inactive(
        ("checkpoint.grace_seconds",),
        lambda job: job.checkpoint.load_only,
        "checkpoint.load_only saves nothing, so signals end the run at once",
    ),
    Inactive(
        ("checkpoint.initial_load_model_only",),
        lambda job: not job.checkpoint.initial_load_path,
        "checkpoint.initial_load_path is not set",
    ),
    Inactive(
        ("checkpoint.initial_load_in_hf_quantized",),
        lambda job: not job.checkpoint.initial_load_in_hf,
        "checkpoint.initial_load_in_hf is false",
    ),
    Inactive(
        ("checkpoint.export_dtype",),
        lambda job: not (job.checkpoint.last_save_model_only or _exports(job)),
        "no save is model-only and nothing is exported: checkpoint.last_save_model_only is false",
    ),
    Inactive(
        ("checkpoint.export_folder",),
        lambda job: not _exports(job),
        "nothing is exported: checkpoint.last_save_in_hf is false and export_interval is 0",
    ),
    Inactive(
        ("checkpoint.enable_ft_dataloader_checkpoints",),
        lambda job: not job.fault_tolerance.enable,
        "fault_tolerance.enable is false",
    ),
    Inactive(("validation.",), lambda job: not job.validation.enable, "validation.enable is false"),
    Inactive(("compile.",), lambda job: not job.compile.enable, "compile.enable is false"),
    Inactive(
        ("profiling.save_traces_folder", "profiling.profiler_"),
        lambda job: not job.profiling.enable_profiling,
        "profiling.enable_profiling is false",
    ),
    Inactive(
        ("profiling.profile_freq",),
        lambda job: not (job.profiling.enable_profiling or job.profiling.enable_memory_snapshot),
        "profiling.enable_profiling and enable_memory_snapshot are false",
    ),
    Inactive(
        ("profiling.save_memory_snapshot_folder",),
        lambda job: not job.profiling.enable_memory_snapshot,
        "profiling.enable_memory_snapshot is false",
    ),
    Inactive(
        ("metrics.save_tb_folder",),
        lambda job: not job.metrics.enable_tensorboard,
        "metrics.enable_tensorboard is false",
    ),
    Inactive(
        ("metrics.save_for_all_ranks",),
        lambda job: not (job.metrics.enable_tensorboard or job.metrics.enable_wandb),
        "neither TensorBoard nor W&B is enabled",
    ),
    Inactive(("activation_checkpoint.selective_ac_option",), _mode_is_not("selective"), "mode is not selective"),
    Inactive(
        ("activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns", "activation_checkpoint.saved_ops"),
        lambda job: not _by_op(job),
        'it is for mode = "selective" with selective_ac_option = "op"',
    ),
    Inactive(
        ("activation_checkpoint.memory_budget", "activation_checkpoint.visualize_memory_budget_pareto"),
        _mode_is_not("memory_budget"),
        "mode is not memory_budget",
    ),
    Inactive(
        tuple(f"activation_checkpoint.{k}" for k in ("early_stop", "preserve_rng_state", "determinism_check", "debug")),
        _mode_is_not("selective", "full"),
        "mode recomputes nothing by itself",
    ),
    Inactive(
        ("parallelism.disable_loss_parallel", "parallelism.enable_async_tensor_parallel"),
        lambda job: job.parallelism.tensor_parallel_degree == 1,
        "parallelism.tensor_parallel_degree is 1",
    ),
    Inactive(
        (
            "parallelism.pipeline_parallel_first_",
            "parallelism.pipeline_parallel_last_",
            "parallelism.pipeline_parallel_layers_",
            "parallelism.pipeline_parallel_schedule",
            "parallelism.pipeline_parallel_schedule_",
            "parallelism.pipeline_parallel_microbatch_",
            "parallelism.module_fqns_per_model_part",
        ),
        lambda job: job.parallelism.pipeline_parallel_degree == 1,
        "parallelism.pipeline_parallel_degree is 1",
    ),
    Inactive(
        ("parallelism.pipeline_parallel_schedule",),
        lambda job: bool(job.parallelism.pipeline_parallel_schedule_csv),
        "parallelism.pipeline_parallel_schedule_csv decides",
    ),
    Inactive(
        (
            "parallelism.pipeline_parallel_first_",
            "parallelism.pipeline_parallel_last_",
            "parallelism.pipeline_parallel_layers_",
        ),
        lambda job: bool(job.parallelism.module_fqns_per_model_part),
        "parallelism.module_fqns_per_model_part decides",
    ),
    Inactive(
        ("parallelism.pipeline_parallel_expert_parallel_overlap",),
        lambda job: True,
        "no schedule overlaps the dispatch of one microbatch's experts with another's compute",
    ),
    Inactive(
        ("parallelism.context_parallel_load_balancer", "parallelism.context_parallel_rotate_method"),
        lambda job: job.parallelism.context_parallel_degree == 1,
        "parallelism.context_parallel_degree is 1",
    ),
    Inactive(
        ("parallelism.expert_parallel_comm_backend",),
        lambda job: job.parallelism.expert_parallel_degree == 1,
        "parallelism.expert_parallel_degree is 1",
    ),
    Inactive(
        ("lr_scheduler.decay_ratio",),
        lambda job: job.lr_scheduler.decay_type == "inverse_sqrt",
        "decay_type is inverse_sqrt",
    ),
    Inactive(
        ("lr_scheduler.min_lr_factor", "lr_scheduler.decay_type"),
        lambda job: job.lr_scheduler.decay_ratio == 0 and job.lr_scheduler.decay_type != "inverse_sqrt",
        "lr_scheduler.decay_ratio is 0: nothing decays",
    ),
    Inactive(("loss.chunk_tokens",), lambda job: job.loss.name == "cross_entropy", 'loss.name is "cross_entropy"'),
    Inactive(("loss.mtp_coefficient",), _looks_not_ahead, "the model has no modules of multi-token prediction"),
    Inactive(
        ("data.streams", "data.shuffle", "data.shuffle_window", "data.on_end"),
        lambda job: job.training.dataset == "synthetic" and not job.data.sources,
        'training.dataset is "synthetic", whose rows are drawn by their number, without end',
    ),
    Inactive(("data.shuffle_window",), lambda job: not job.data.shuffle, "data.shuffle is false"),
    Inactive(("training.dataset",), lambda job: bool(job.data.sources), "[[data.sources]] are there"),
    Inactive(
        ("validation.dataset",),
        lambda job: bool(job.validation.sources),
        "[[validation.sources]] are there",
    ),
    Inactive(("data.unit",), lambda job: len(job.data.sources) < 2, "there is one source only, nothing to mix"),
    Inactive(("data.packing_window",), lambda job: job.data.packing != "best_fit", 'data.packing is not "best_fit"'),
    Inactive(
        ("data.long_documents",),
        lambda job: job.data.packing == "concat",
        'data.packing is "concat", which cuts documents where a row is full',
    ),
    Inactive(
        ("data.streams", "data.shuffle", "data.on_end", "data.add_bos", "data.add_eos"),
        lambda job: job.data.order == "megatron",
        'data.order is "megatron", which says all of that',
    ),
    Inactive(
        ("training.dataloader.persistent_workers",),
        lambda job: True,
        "training is one pass from the first step to the last, epochs included",
    ),
    Inactive(("training.spike_",), lambda job: job.training.on_spike == "ignore", 'training.on_spike is "ignore"'),
    Inactive(("training.gc_freq",), lambda job: job.training.gc_debug, "training.gc_debug collects at every step"),
    Inactive(
        ("comm.save_traces_folder", "comm.save_traces_file_prefix"),
        lambda job: job.comm.trace_buf_size == 0,
        "comm.trace_buf_size is 0: nothing is recorded",
    ),
    Inactive(("comm.fake_rank",), lambda job: job.comm.mode != "fake_backend", "comm.mode is not fake_backend"),
    Inactive(("moe.", "debug.moe_force_load_balance"), _has_no_experts, "the model has no experts"),
    Inactive(
        ("debug.deterministic_warn_only",), lambda job: not job.debug.deterministic, "debug.deterministic is false"
    ),
    Inactive(("fault_tolerance.",), lambda job: not job.fault_tolerance.enable, "fault_tolerance.enable is false"),
    Inactive(
        ("memory_estimation.",), lambda job: not job.memory_estimation.enable, "memory_estimation.enable is false"
    ),
)


def inactive(job: JobConfig, key: str) -> str | None:
    """Why the key does nothing in this job; None if it does something. The switch of a section is never inactive."""
    if key.endswith(".enable"):
        return None
    return next((entry.why for entry in INACTIVE if _covers(entry, key) and entry.idle(job)), None)


def _covers(entry: Inactive, key: str) -> bool:
    return any(key == known or (known[-1] in "._" and key.startswith(known)) for known in entry.keys)
