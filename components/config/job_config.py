"""JobConfig: every section of a TOML file in one frozen value. How it is filled (files, command line) is the
Trainer's business."""

from dataclasses import dataclass, field

from components.config.checkpoint import Checkpoint
from components.config.compute import ActivationCheckpoint, Compile, MemoryEstimation
from components.config.data import Data
from components.config.job import Debug, Experimental, Job, Metrics, Profiling
from components.config.model import Model, Quantize
from components.config.moe import MoE
from components.config.optim import LRScheduler, Optimizer
from components.config.parallelism import Comm, FaultTolerance, Parallelism
from components.config.training import Loss, Training, Validation


@dataclass(frozen=True)
class JobConfig:
    """One job. Each field is the TOML section of the same name; nested fields are sub-tables."""

    job: Job = field(default_factory=Job)
    """The run itself."""
    model: Model = field(default_factory=Model)
    """Family, flavor, tokenizer, converters."""
    training: Training = field(default_factory=Training)
    """Batch, sequence, steps, precision."""
    data: Data = field(default_factory=Data)
    """Order and shape of the rows."""
    loss: Loss = field(default_factory=Loss)
    """The loss."""
    moe: MoE = field(default_factory=MoE)
    """Balancing of experts."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How weights move."""
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    """How fast."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Degrees of the mesh."""
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    """Recompute."""
    compile: Compile = field(default_factory=Compile)
    """torch.compile."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving and resuming."""
    validation: Validation = field(default_factory=Validation)
    """Held-out loss."""
    metrics: Metrics = field(default_factory=Metrics)
    """Reports."""
    profiling: Profiling = field(default_factory=Profiling)
    """Traces."""
    quantize: Quantize = field(default_factory=Quantize)
    """Settings of the quantizing converters."""
    comm: Comm = field(default_factory=Comm)
    """Process groups."""
    debug: Debug = field(default_factory=Debug)
    """Seeds and determinism."""
    experimental: Experimental = field(default_factory=Experimental)
    """Code of one's own."""
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    """Replica groups."""
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    """TorchTitan's estimate."""
