"""What a run is called, where it writes, what it reports: `[job]`, `[metrics]`, `[profiling]`, `[debug]`,
`[experimental]`."""

from dataclasses import dataclass

from components.config.types import NonEmpty, NonNegativeInt, Positive, PositiveInt, Seed


@dataclass(frozen=True)
class Job:
    """`[job]`: the run itself."""

    config_file: str | None = None
    """Path of the TOML file; set by `CONFIG_FILE` or on the command line, never inside the file itself."""
    dump_folder: NonEmpty = "./outputs"
    """Folder that everything the run writes goes into; created if missing."""
    description: str = "default job"
    """Free text, printed at start and saved with the run."""
    print_config: bool = False
    """Print every resolved value and where it came from, before training starts."""
    save_config_file: str | None = None
    """A further path, inside `dump_folder`, for the resolved TOML; `config.toml` is always written there."""
    custom_config_module: str = ""
    """Python module whose `JobConfig` dataclass adds sections or keys to the built-in ones. Importing it runs its
    code."""


@dataclass(frozen=True)
class Profiling:
    """`[profiling]`: traces of the PyTorch profiler and snapshots of the allocator."""

    enable_profiling: bool = False
    """Write a Chrome trace every `profile_freq` steps. The profiled steps are slower."""
    save_traces_folder: str = "profile_traces"
    """Folder inside `dump_folder` for the traces, one sub-folder a step and one file a rank."""
    profile_freq: PositiveInt = 10
    """Steps from one trace to the next; at least `profiler_warmup + profiler_active`."""
    profiler_active: PositiveInt = 1
    """Steps recorded in each trace."""
    profiler_warmup: NonNegativeInt = 3
    """Steps run under the profiler but not recorded, before each trace."""
    enable_memory_snapshot: bool = False
    """Write a snapshot of the allocator every `profile_freq` steps. Needs an accelerator; refused on a CPU."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder inside `dump_folder` for the snapshots."""


@dataclass(frozen=True)
class Metrics:
    """`[metrics]`: what is reported, how often and where to. `metrics.jsonl` is always written."""

    log_freq: PositiveInt = 10
    """Steps from one report to the next; step 1 and the last step are always reported. Each report waits for the
    device."""
    enable_tensorboard: bool = False
    """Also write TensorBoard event files."""
    disable_color_printing: bool = False
    """Plain text on the console even when it is a terminal."""
    save_tb_folder: str = "tb"
    """Folder inside `dump_folder` for TensorBoard."""
    save_for_all_ranks: bool = False
    """Every rank writes TensorBoard and W&B, not only rank 0; reduced values are equal on all, memory and timings are
    not."""
    enable_wandb: bool = False
    """Also report to Weights & Biases (optional extra `wandb`)."""
    peak_tflops: Positive | None = None
    """Dense peak rate of one device in TFLOP/s, for MFU on hardware that is not in the built-in table. None: the
    table, else "n/a"."""


@dataclass(frozen=True)
class Debug:
    """`[debug]`: seeds and determinism."""

    seed: Seed | None = None
    """Seed of initialization, shuffling and forward randomness. None: 0, and the log says so; results never depend on
    the clock."""
    deterministic: bool = False
    """Only deterministic kernels; slower on accelerators, without effect on most CPU kernels."""
    deterministic_warn_only: bool = False
    """Warn instead of failing where a deterministic kernel is missing."""
    compare_ranks: NonNegativeInt = 0
    """Every so many steps, compare gradients and weights of ranks that must hold the same, and log who disagrees; 0:
    never. Costs a pass over both and a small gather."""
    moe_force_load_balance: bool = False
    """Route tokens evenly whatever the router says, for benchmarks of mixture-of-experts models."""


@dataclass(frozen=True)
class Experimental:
    """`[experimental]`: ways to bring in code of one's own."""

    custom_import: str = ""
    """Python module imported at start-up; it may register train specs, optimizers, losses and datasets. Runs its
    code."""
    custom_args_module: str = ""
    """Alias of `job.custom_config_module`, kept from TorchTitan."""
