"""How weights move: `[optimizer]`, `[lr_scheduler]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import Fraction, NonNegative, NonNegativeInt, OpenFraction, Positive, PositiveInt


@dataclass(frozen=True)
class ParameterGroup:
    """One entry of `optimizer.parameter_groups`: parameters by name, and what differs for them."""

    pattern: str
    """Regular expression searched in the canonical parameter name; the first entry that matches a parameter takes
    it."""
    lr_factor: NonNegative = 1.0
    """Multiplies the learning rate of the group at every step; 0 freezes it."""
    weight_decay: NonNegative | None = None
    """Weight decay of the group; None: that of `[optimizer]`."""


@dataclass(frozen=True)
class Optimizer:
    """`[optimizer]`: how weights move."""

    name: str = "AdamW"
    """Registered name of the optimizer: Adam, AdamW."""
    lr: Positive = 8e-4
    """Peak learning rate."""
    beta1: OpenFraction = 0.9
    """Decay of the first moment."""
    beta2: OpenFraction = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Weight decay of every parameter that no group says otherwise for; decoupled in AdamW, in the gradient in Adam."""
    implementation: Literal["auto", "for-loop", "foreach", "fused"] = "auto"
    """Kernel of the step. `auto` takes fused where the device has it, else foreach (TorchTitan's default is fused)."""
    early_step_in_backward: bool = False
    """Step each parameter in backward, as soon as its gradient is complete, and free that: never more than one FSDP
    unit's gradients at a time. Needs `training.max_norm = inf`, since nothing can be clipped. A step that is
    not finite has moved weights by the time it stops the run: go back to a checkpoint then."""
    parameter_groups: list[ParameterGroup] = field(default_factory=list)
    """Exceptions by name. No decay on norms and biases: `parameter_groups = [{ pattern = 'norm|bias', weight_decay =
    0.0 }]`."""


@dataclass(frozen=True)
class LRScheduler:
    """`[lr_scheduler]`: linear warm-up, stable, decay; a factor of `optimizer.lr`."""

    warmup_steps: NonNegativeInt = 200
    """Steps of linear warm-up; step s of W has the factor s / W. More than the schedule has are cut, with a note."""
    total_steps: PositiveInt | None = None
    """Steps that the schedule spans; None: `training.steps`. Part of the job's fingerprint once set."""
    decay_ratio: Fraction | None = None
    """Share of the steps that decay, at the end. None: decay starts right after warm-up; 0: no decay. More than
    warm-up leaves is cut, with a note."""
    decay_type: Literal["linear", "sqrt", "cosine", "inverse_sqrt"] = "linear"
    """Shape of the decay over x from 0 to 1: 1−x, 1−√x, ½(1+cos πx); inverse_sqrt: √(W/s) from the end of warm-up W
    on."""
    min_lr_factor: Fraction = 0.0
    """The factor that the decay ends at (for inverse_sqrt: the floor)."""
