"""The table of keys that are refused while they are live: what Espalier cannot do yet.

A key whose feature is not built is refused only when it would do something: a TOML that merely mentions it loads. A
table, not code at the features, so that one place shows what is missing, and a line goes when a feature comes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from components.config.annotations import toml_literal
from components.config.job_config import JobConfig
from components.config.schema import get

Predicate = Callable[[JobConfig], bool]


@dataclass(frozen=True)
class Unsupported:
    """A key that is refused while `live` says that it would do something."""

    key: str
    live: Predicate
    why: str
    """What is missing, and what to do instead."""


CONVERTERS = ("quantize.linear.float8", "quantize.linear.mx", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx")
"""Names of model converters that a TorchTitan file may list."""

LATER = "not yet supported"

UNSUPPORTED = (
    Unsupported(
        "model.converters",
        # Other names are unknown, unless they are a module's own: `check_names` leaves those to it.
        lambda job: any(job.experimental.custom_import or name in CONVERTERS for name in job.model.converters),
        "model converters are not there yet; train without them: converters = []",
    ),
    Unsupported(
        "parallelism.expert_parallel_comm_backend",
        lambda job: (
            job.parallelism.expert_parallel_comm_backend == "deepep" and job.parallelism.expert_parallel_degree > 1
        ),
        'DeepEP is a CUDA library of its own, whose kernels nothing here could be tested with; set it to "standard"',
    ),
    Unsupported(
        "fault_tolerance.enable",
        lambda job: job.fault_tolerance.enable,
        "replica groups that may fail are not there yet; set it to false and resume from checkpoints",
    ),
    Unsupported(
        "memory_estimation.enable",
        lambda job: job.memory_estimation.enable,
        "the dry run takes its place: COMM_MODE=fake_backend ./run_train.sh; set it to false",
    ),
)


def unsupported(job: JobConfig) -> list[str]:
    """One line for each key that is live and not supported."""
    return [
        f"{entry.key} = {toml_literal(get(job, tuple(entry.key.split('.'))))}: {LATER}: {entry.why}"
        for entry in UNSUPPORTED
        if entry.live(job)
    ]
