"""What is traded between memory, compute and compile time: `[activation_checkpoint]`, `[compile]`,
`[memory_estimation]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import Fraction

SAVED_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_to_all_single",
    "aten::max",
)
"""The default of `activation_checkpoint.saved_ops`."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """`[activation_checkpoint]`: recompute activations in backward instead of keeping them."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """none keeps all; full recomputes every block (about a third more FLOPs); selective some blocks, or some ops of
    each; memory_budget lets the compiler choose (needs `compile`)."""
    selective_ac_option: str = "2"
    """For selective: an integer n recomputes every n-th block; `op` keeps expensive ops and recomputes the cheap
    ones."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """For `op`: matmuls with the weight shape of these modules are recomputed in any case."""
    saved_ops: list[str] = field(default_factory=lambda: list(SAVED_OPS))
    """For `op`: operations whose results are kept besides those of every second matmul, as torch names them. By
    default attention, communication that would have to be repeated, and the maxima that float8 scales by."""
    early_stop: bool = False
    """Stop a recomputation once the last tensor that is needed is there."""
    memory_budget: Fraction = 0.5
    """For memory_budget: share of the activations that compiled code would keep by itself that it may keep; the least
    recomputation that fits is chosen, by FLOPs. 1: all, 0: only a block's inputs."""
    visualize_memory_budget_pareto: bool = False
    """For memory_budget: draw what other budgets would cost, as SVG files in `memory_budget_pareto` inside
    `dump_folder`. Needs matplotlib."""
    preserve_rng_state: bool = True
    """Restore the random state for recomputation. The built-in models draw nothing from it."""
    determinism_check: str = "default"
    """Check of recomputed tensors against the originals' metadata: default or none."""
    debug: bool = False
    """Record the operations of both passes, and print them when they differ. Slow."""


@dataclass(frozen=True)
class Compile:
    """`[compile]`: torch.compile, per block and for the loss."""

    enable: bool = False
    """Compile. The first step then takes from seconds to minutes; equal blocks share one artifact."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: each block of the model, the loss."""
    backend: str = "inductor"
    """Name of torch.compile's back end."""


@dataclass(frozen=True)
class MemoryEstimation:
    """`[memory_estimation]`: TorchTitan's estimate. Here it is the dry run (`COMM_MODE=fake_backend`); refused when
    enabled."""

    enable: bool = False
    """Estimate memory instead of training."""
    disable_fake_mode: bool = False
    """Estimate with real tensors."""
