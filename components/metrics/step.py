"""StepMetrics: what is reported of one step, and how it is written as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Validated(NamedTuple):
    """What a validation of several sets has found."""

    loss: float
    """Mean loss per valid label token of all sets together."""
    sets: Mapping[str, float]
    """The mean of each, by name."""


@dataclass(frozen=True)
class StepMetrics:
    """One report. Facts of the step (loss to tokens) are equal on all ranks and in every layout; rates are not."""

    step: int
    """The optimizer step, from 1."""
    loss: float | None
    """Mean loss per valid label token of the step's global batch, in nats; None where it was not computed, like the
    next two."""
    max_loss: float | None
    """Largest per-row mean loss of the global batch."""
    grad_norm: float | None
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate that the step used."""
    tokens: int
    """Valid label tokens that the job has trained on up to and including this step, over all ranks."""
    tokens_per_second: float
    """Positions computed by the whole job per second, padding and masked labels included, since the last report."""
    tflops: float
    """Model TFLOP/s of one device (recomputation is not counted), since the last report."""
    mfu: float | None
    """Share (0 to 1) of the device's peak that `tflops` is; None where the peak is not known."""
    memory_gib: float
    """Peak memory of this rank's device (on a CPU: of its process), in GiB."""
    data_wait: float
    """Share (0 to 1) of the time spent waiting for data, since the last report."""
    seconds: float
    """Seconds per step, since the last report."""
    validation_loss: float | None = None
    """Mean loss per valid label token of the validation set; None in steps without validation."""
    validation_losses: Mapping[str, float] = field(default_factory=dict)
    """The same of each validation set, where there are several."""
    memory_share: float | None = None
    """`memory_gib` as a share (0 to 1) of what there is; None where that is not known."""

    def to_dict(self) -> dict[str, Any]:
        """The fields; of `validation_loss` and `validation_losses` what there is."""
        fields = asdict(self)
        if self.validation_loss is None:
            del fields["validation_loss"]
        if not self.validation_losses:
            del fields["validation_losses"]
        return fields

    def to_json(self) -> str:
        """One JSON object on one line."""
        return to_json(self.to_dict())


def to_json(values: dict[str, Any]) -> str:
    """Strict JSON, which has no NaN: such a number is null, and `nonfinite` says which it was."""
    bad = {key: str(value) for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        values = {**values, **dict.fromkeys(bad), "nonfinite": bad}
    return json.dumps(values, allow_nan=False, ensure_ascii=False)
