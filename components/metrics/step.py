"""StepMetrics: what is reported of one step, and how it is written as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Validated(NamedTuple):
    """What a validation of several sets has found."""

    loss: float | None
    """Mean loss per valid label token of all sets together; None where none of them has such a token."""
    sets: Mapping[str, float | None]
    """The mean of each, by name; None for one without such a token. Empty for a single set whose mean is known."""


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
    """Mean loss per valid label token of the validation set; None in steps without validation, and where it is not
    known."""
    validation_losses: Mapping[str, float | None] = field(default_factory=dict)
    """The same of each validation set, where there are several, or the only one's is not known."""
    memory_share: float | None = None
    """`memory_gib` as a share (0 to 1) of what there is; None where that is not known."""

    @property
    def validated(self) -> bool:
        """Whether there was a validation in this step."""
        return self.validation_loss is not None or bool(self.validation_losses)

    def to_dict(self) -> dict[str, Any]:
        """The fields; of `validation_loss` and `validation_losses` what there is."""
        fields = asdict(self)
        if not self.validated:
            del fields["validation_loss"]
        if not self.validation_losses:
            del fields["validation_losses"]
        return fields

    def to_json(self) -> str:
        """One JSON object on one line."""
        return to_json(self.to_dict())


def to_json(values: dict[str, Any]) -> str:
    """Strict JSON, which has no NaN: such a number is null, and `nonfinite` says which it was, by its dotted name."""
    bad: dict[str, str] = {}
    values = _finite(values, "", bad)
    return json.dumps(values | ({"nonfinite": bad} if bad else {}), allow_nan=False, ensure_ascii=False)


def _finite(values: Mapping[str, Any], within: str, bad: dict[str, str]) -> dict[str, Any]:
    """The values, with None for numbers that are not finite; these are added to `bad`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            value = _finite(value, f"{name}.", bad)
        elif isinstance(value, float) and not math.isfinite(value):
            bad[name], value = str(value), None
        found[key] = value
    return found
