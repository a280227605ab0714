"""How a job is laid out over ranks, and how they talk: `[parallelism]`, `[comm]`, `[fault_tolerance]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import AllOrPositive, Fraction, NonNegativeInt, PositiveInt, Seconds


@dataclass(frozen=True)
class Parallelism:
    """`[parallelism]`: degrees of the mesh. A layout is how a job runs, never what it computes."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Copies of the model (DDP; with sharding: HSDP)."""
    data_parallel_shard_degree: AllOrPositive = -1
    """Ranks that share one copy's parameters, gradients and optimizer state (FSDP2). −1: all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after forward: less memory, one more all-gather. default: always, but never under
    pipeline parallelism."""
    tensor_parallel_degree: PositiveInt = 1
    """Ranks that share each matrix and, between matrices, each sequence. Divides `seq_len` and the heads, and divides
    or is divided by the key-value heads; other sizes may be uneven. Each block gathers and scatters hidden states
    twice, forward and backward: for ranks with a fast connection."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss instead of computing it over a sharded vocabulary: each rank then holds as many
    as without tensor parallelism."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with matmuls; needs CUDA and `compile` with inductor."""
    pipeline_parallel_degree: PositiveInt = 1
    """Ranks that the layers are dealt to. Only hidden states travel; the price is the time that stages wait, see the
    schedule."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """The modules of each pipeline stage, by name; each of the model once, in order. None: cut by layers; those
    that are left over go to the stages with the fewest FLOPs, then parameters."""
    pipeline_parallel_first_stage_less_layers: NonNegativeInt = 1
    """Layers that the first stage has less than the others, to make room for the embedding."""
    pipeline_parallel_last_stage_less_layers: NonNegativeInt = 1
    """Layers that the last stage has less than the others, to make room for the head and the loss."""
    pipeline_parallel_layers_per_stage: PositiveInt | None = None
    """Layers of a stage. None: one stage per rank, or two for interleaved schedules."""
    pipeline_parallel_schedule: str = "1F1B"
    """GPipe, 1F1B; with two or more stages on each rank LoopedBFS, Interleaved1F1B, InterleavedZeroBubble; with two,
    there and back, ZBVZeroBubble, DualPipeV."""
    pipeline_parallel_schedule_csv: str | None = ""
    """CSV file with a schedule of one's own, which then decides: a row for each pipeline rank, cells such as 0F2 (stage
    0, forward, microbatch 2; B: backward; I, W: for inputs, for weights)."""
    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Rows of one pipeline microbatch; divides `local_batch_size`."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap expert dispatch with compute in schedules that can. Does nothing: no schedule here does."""
    context_parallel_degree: PositiveInt = 1
    """Ranks that share each sequence; `seq_len` is a multiple of it, and of twice as much with `headtail`. They share
    parameters as those of `data_parallel_shard_degree` do."""
    context_parallel_load_balancer: Literal["headtail", ""] | None = "headtail"
    """How sequences are dealt: headtail gives each rank two chunks, an early and a late one, so that causal attention
    costs the same everywhere; empty or none gives each one piece, so that the last rank has twice the average work."""
    context_parallel_rotate_method: Literal["allgather", "alltoall", "ulysses"] = "allgather"
    """How queries meet keys. allgather: each rank gathers the keys and values of whole rows in each block; one
    transfer, which compute waits for. alltoall: a ring, in which they pass from rank to rank beside the compute; least
    memory, more and smaller transfers. ulysses: ranks trade tokens for heads and attend to whole rows; least traffic on
    many ranks, which must divide the heads, and with `data.document_mask` a mask of whole rows (on CUDA one of blocks,
    else seq_len² bytes each)."""
    expert_parallel_degree: PositiveInt = 1
    """Ranks that share the experts, whose number it divides. They are those of shard, context and tensor degree, dealt
    anew: no further ranks. Tokens travel to their experts and back in each block."""
    expert_tensor_parallel_degree: PositiveInt = 1
    """Ranks that share each expert's matrices: 1 or the tensor-parallel degree."""
    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """How tokens travel to experts. standard: all-to-alls of uneven pieces; deepep is refused."""


@dataclass(frozen=True)
class Comm:
    """`[comm]`: process groups."""

    init_timeout_seconds: Seconds = 300
    """Timeout of a collective until the first step is done (compilation, lazy set-up)."""
    train_timeout_seconds: Seconds = 100
    """Timeout of a collective after the first step."""
    checkpoint_timeout_seconds: Seconds = 1800
    """Timeout of a collective while checkpoints are saved, checked or loaded: ranks wait there for the slowest storage,
    and for what one rank does alone."""
    trace_buf_size: NonNegativeInt = 20000
    """Entries of torch's flight recorder, which notes every collective and where it was called; 0 switches it off, and
    a collective that does not end is then told without its name."""
    save_traces_folder: str = "comm_traces"
    """Folder inside `dump_folder` that every rank writes its flight recording to when a collective does not end."""
    save_traces_file_prefix: str = "rank_"
    """Start of their file names."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """default trains; fake_backend is the dry run; local_tensor runs all ranks in one process. Usually set by
    `COMM_MODE`."""
    fake_rank: NonNegativeInt = 0
    """The rank that a dry run pretends to be, from 0: under pipeline parallelism ranks hold different layers."""


@dataclass(frozen=True)
class FaultTolerance:
    """`[fault_tolerance]`: replica groups that come and go, with TorchFT. Not yet supported: inactive unless
    enabled."""

    enable: bool = False
    """Train with replica groups that may fail."""
    process_group: str = "gloo"
    """Back end between replica groups."""
    process_group_timeout_ms: PositiveInt = 10000
    """Their timeout, in milliseconds."""
    replica_id: NonNegativeInt = 0
    """Number of this replica group."""
    group_size: NonNegativeInt = 0
    """Number of replica groups."""
    min_replica_size: PositiveInt = 1
    """Fewest groups that a step needs."""
    semi_sync_method: str | None = None
    """local_sgd or diloco; None synchronises every step."""
    sync_steps: PositiveInt = 5
    """Local steps between synchronisations."""
    should_quantize: bool = False
    """Quantize what is sent between groups."""
    fragment_sync_delay: NonNegativeInt = 0
    """Steps by which the synchronisation of a fragment is put off."""
    fragment_update_alpha: Fraction = 0.0
    """Weight of the local parameters when a fragment is merged."""
    module_fqns_per_model_fragment: list[list[str]] = field(default_factory=list)
    """The modules of each fragment, by name."""
    num_fragments: PositiveInt = 1
    """Number of fragments."""
