"""What is trained on, how much of it at a time, and how it is judged: `[training]`, `[loss]`, `[validation]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.data import Source
from components.config.types import AllOrPositive, Dtype, NonNegativeInt, Positive, PositiveInt, PositiveOrInf


@dataclass(frozen=True)
class DataLoader:
    """`[training.dataloader]` and `[validation.dataloader]`: how rows are produced, never which."""

    num_workers: NonNegativeInt = 0
    """Worker processes per rank; 0 reads in the training process. More than the rank's rows are not started."""
    persistent_workers: bool = False
    """Keep workers alive from one validation to the next; training is one pass, epochs included. Needs `num_workers`
    > 0."""
    pin_memory: bool = False
    """Page-locked host memory, for faster copies to an accelerator; without one it is ignored, and the log says so."""
    prefetch_factor: PositiveInt | None = None
    """Steps that each worker prepares ahead. Needs `num_workers` > 0."""


@dataclass(frozen=True)
class Training:
    """`[training]`: data, batch, sequence, steps, precision."""

    dataset: str = "c4_test"
    """Registered name of the dataset, or with `dataset_path` any name for it."""
    dataset_path: str | None = None
    """Local file, folder or glob (JSONL, parquet, text; .gz, .zst) or a Hugging Face dataset; None: the place that
    the name stands for."""
    local_batch_size: PositiveInt = 8
    """Rows (sequences) of one forward pass on one data-parallel rank."""
    global_batch_size: AllOrPositive = -1
    """Rows of one optimizer step over all ranks; the rest is gradient accumulation. −1: `local_batch_size` ×
    data-parallel degree."""
    seq_len: PositiveInt = 2048
    """Tokens in a row."""
    max_norm: PositiveOrInf = 1.0
    """Clip the global gradient norm to this; `inf` clips nothing."""
    steps: PositiveInt = 10000
    """Optimizer steps of the job."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP). Slower."""
    dtype: Dtype = "float32"
    """Type that parameters are stored and updated in. bfloat16 halves memory and loses small updates."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type that block parameters are cast to for compute. `auto`: bfloat16 on devices that have it fast, else
    float32."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type that gradients are reduced in."""
    gc_freq: PositiveInt = 50
    """Steps between garbage collections, on all ranks at the same step."""
    gc_debug: bool = False
    """Collect every step, and log what the collector found. Slow."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient norm that is not finite: stop before the optimizer step, skip the step and go on, or go back
    to the last checkpoint and then skip the step when it comes again."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same for a loss or gradient norm that is finite but far above those of the last `spike_window` steps."""
    spike_window: PositiveInt = 100
    """Accepted steps whose medians a step is compared with; nothing is a spike before there are so many."""
    spike_loss_factor: Positive = 1.5
    """A loss above the median times this is a spike."""
    spike_grad_norm_factor: Positive = 10.0
    """A gradient norm above the median times this is a spike."""
    exit_after: NonNegativeInt = 0
    """Seconds after the start of the job by which it has saved and ended, with exit code 75: the scheduler's limit. It
    stops `checkpoint.grace_seconds` before. 0: no limit."""
    dataloader: DataLoader = field(default_factory=DataLoader)
    """Workers and prefetching."""


@dataclass(frozen=True)
class Loss:
    """`[loss]`: what is minimized."""

    name: str = "cross_entropy"
    """Registered name: cross_entropy, or chunked_cross_entropy, which never holds the logits of all tokens."""
    chunk_tokens: PositiveInt = 2048
    """Tokens projected at a time by chunked_cross_entropy. Smaller: less memory, more kernel launches."""
    mtp_coefficient: Positive = 0.3
    """Weight of multi-token prediction in the objective, of all modules together; the reported loss stays the plain
    one. DeepSeek-V3's, which it lowers to 0.1 late in training. `model.mtp_layers = 0` switches it off."""


@dataclass(frozen=True)
class Validation:
    """`[validation]`: the loss on held-out rows, through the same forward path as training."""

    enable: bool = False
    """Validate every `freq` steps and at the end."""
    dataset: str = "c4_validation"
    """As `training.dataset`."""
    dataset_path: str | None = None
    """As `training.dataset_path`."""
    sources: list[Source] = field(default_factory=list)
    """Tables `[[validation.sources]]`: several sets, each reported under its name. Empty: `dataset` is the only one."""
    local_batch_size: PositiveInt = 8
    """Rows of one forward pass on one data-parallel rank."""
    global_batch_size: AllOrPositive = -1
    """Rows of one validation step over all ranks. −1: `local_batch_size` × data-parallel degree."""
    seq_len: PositiveInt = 2048
    """Tokens in a row."""
    freq: PositiveInt = 10
    """Training steps between validations."""
    steps: AllOrPositive = -1
    """Validation steps each time; −1: the whole validation set, the incomplete last batch included."""
    dataloader: DataLoader = field(default_factory=DataLoader)
    """Workers and prefetching."""
