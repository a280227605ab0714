"""What is saved, when, and what a run starts from: `[checkpoint]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import LatestOrStep, NonEmpty, NonNegativeInt, PositiveInt, Seconds


@dataclass(frozen=True)
class Checkpoint:
    """`[checkpoint]`: saving and resuming."""

    enable: bool = False
    """Save checkpoints and resume from the latest valid one."""
    enable_ft_dataloader_checkpoints: bool = True
    """Per-replica loader state under fault tolerance; inactive without it."""
    folder: str = "checkpoint"
    """Folder inside `dump_folder` that holds the `step-N` folders, or a URL of any storage that fsspec knows
    (`s3://bucket/name`): what has no atomic rename is committed by writing the manifest last."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: from the latest valid checkpoint in `folder`, past broken ones with a warning, and from `initial_load_path`
    or nothing if there is none; must: stop if there is none in `folder`, or if the latest is broken; never: a new
    course, what is in `folder` is set aside. A restart by torchrun goes on from the new course's checkpoints."""
    verify: Literal["hashes", "sizes"] = "hashes"
    """What is checked of a checkpoint before it is loaded: every byte, or only that its files have their sizes."""
    interval: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    initial_load_path: str | None = None
    """Checkpoint (a `step-N` folder) that a new run starts from; a checkpoint in `folder` wins over it."""
    initial_load_model_only: bool = True
    """Take only the weights from `initial_load_path`; false: optimizer, schedule and data position too."""
    initial_load_in_hf: bool = False
    """`initial_load_path` holds Hugging Face safetensors."""
    initial_load_in_hf_quantized: bool = False
    """… and they are quantized (FP8 in blocks, or MXFP4): they are dequantized as they are read. Without it such
    weights are refused, with it all others."""
    last_save_model_only: bool = False
    """Save only the weights at the last step. Default false, unlike TorchTitan's: a finished run can then be
    extended."""
    last_save_in_hf: bool = False
    """Write the last step's weights as Hugging Face safetensors too, into `export_folder`."""
    export_interval: NonNegativeInt = 0
    """Steps from one export of the weights as Hugging Face safetensors to the next; 0: none."""
    export_folder: NonEmpty = "export"
    """Folder inside `dump_folder`, or a URL, that holds the exports, `step-N` each."""
    export_dtype: Literal["float16", "bfloat16", "float32", "source"] = "float32"
    """Type of the weights in model-only saves and exports. source: exports have each tensor in the type that it had in
    the Hugging Face files that the job's weights came from (bfloat16 for what was quantized), model-only saves as it is
    trained; refused if they came from none."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save in the background: training waits only while its state is copied to host memory (a second copy of it there),
    into pinned memory with the last."""
    max_failed_saves: PositiveInt = 3
    """The run stops with this many failed saves in a row; before that it goes on, and the log says so. A save that
    fails at the last step or on a signal always ends it as failed."""
    grace_seconds: Seconds = 300
    """Longest time from SIGTERM or SIGINT to the end of the run, its checkpoint included; what is not saved by then is
    given up. Keep it below the time that the scheduler gives before it kills."""
    keep_latest_k: NonNegativeInt = 10
    """Checkpoints to keep, the newest; 0 keeps all. The last valid one is never deleted, nor anything that Espalier
    did not write."""
    load_step: LatestOrStep = -1
    """Resume from exactly this step; −1: the latest valid checkpoint. A step that is not there is an error."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts that are left as they are when loading: model, optimizer, lr_scheduler, dataloader, train_state, rng (the
    random generators)."""
    enable_first_step_checkpoint: bool = False
    """Also save at step 1, to try out early whether saving works."""
    create_seed_checkpoint: bool = False
    """Write the initial weights as step 0 and stop. The next run of the job, on any layout, starts from them."""
    load_only: bool = False
    """Load, never save."""
