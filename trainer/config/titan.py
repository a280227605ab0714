"""What is known about TorchTitan's configuration, so that its files load and its users find their way.

Facts of v0.2.2, and the names that keys had in earlier releases, which many files still have.
"""

CONVERTER_ALIASES = {"float8": "quantize.linear.float8"}
"""Older names of model converters; the first still stands in v0.2.2's own llama3_405b.toml."""

RENAMED = {
    "float8": "quantize.linear.float8",
    "float8.enable_fsdp_float8_all_gather": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "float8.filter_fqns": "quantize.linear.float8.filter_fqns",
    "float8.recipe_name": "quantize.linear.float8.recipe_name",
    "mx": "quantize.linear.mx",
    "quantize.dense": "quantize.linear",
    "quantize.moe": "quantize.grouped_mm",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.interval_type": "checkpoint.interval",
    "validation.enabled": "validation.enable",
    "job.print_args": "job.print_config",
    "parallelism.enable_compiled_autograd": "compile.enable",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
}
"""Names of sections and keys in earlier releases → what the error message offers instead. Never mapped silently:
some changed their meaning with their name."""

DIFFERENT_DEFAULTS: dict[str, object] = {
    "checkpoint.last_save_model_only": True,
    "optimizer.implementation": "fused",
    "training.mixed_precision_param": "bfloat16",
}
"""Key → its default in v0.2.2, where ours differs. The key's own docstring says why."""

OUR_SECTIONS = ("data", "loss", "moe")
"""Sections that v0.2.2 does not have."""

OUR_KEYS = (
    "activation_checkpoint.saved_ops",
    "checkpoint.export_folder",
    "checkpoint.export_interval",
    "checkpoint.grace_seconds",
    "checkpoint.max_failed_saves",
    "checkpoint.resume",
    "checkpoint.verify",
    "comm.checkpoint_timeout_seconds",
    "comm.fake_rank",
    "debug.compare_ranks",
    "metrics.peak_tflops",
    "model.mtp_layers",
    "optimizer.parameter_groups",
    "training.exit_after",
    "training.on_nonfinite",
    "training.on_spike",
    "training.spike_grad_norm_factor",
    "training.spike_loss_factor",
    "training.spike_window",
    "validation.global_batch_size",
    "validation.sources",
)
"""Keys that v0.2.2 does not have, in sections that it has."""
