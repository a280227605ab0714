"""What keeps the experts of a mixture in use: `[moe]`. TorchTitan has these numbers in its flavors."""

from dataclasses import dataclass

from components.config.types import NonNegative


@dataclass(frozen=True)
class MoE:
    """`[moe]`: balancing of experts. Inactive in models without experts."""

    balance_coefficient: NonNegative | None = None
    """Weight of the balance loss in the objective; the reported loss stays the plain one. 0: none. None: the
    flavor's."""
    bias_rate: NonNegative | None = None
    """How far an expert's selection bias moves in each step, towards an even load. 0: there is no bias. None: the
    flavor's."""
