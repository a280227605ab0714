"""Keys that say "derive it" get their numbers here, once, before anything is built, so that nothing else knows of −1.

What follows the data-parallel degree is a fact of the first run: a resume keeps the number that was saved.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from components.config.job_config import JobConfig
from components.runtime.errors import ConfigError

BATCH = "training.global_batch_size"
STREAMS = "data.streams"
VALIDATION_BATCH = "validation.global_batch_size"


def settle(job: JobConfig, degree: int, saved: Mapping[str, Any]) -> tuple[JobConfig, list[str]]:
    """The job with its derived sizes, and a note for each.

    `degree` is the data-parallel degree, `saved` the fingerprint of the checkpoint that will be resumed (empty: none).
    Raises ConfigError if a saved global batch does not fit this layout.
    """
    notes: list[str] = []
    batch = job.training.global_batch_size
    if batch == -1:
        batch = saved.get(BATCH, job.training.local_batch_size * degree)
        notes.append(batch_note(job, batch, degree, BATCH in saved))
    if batch % (job.training.local_batch_size * degree):
        raise ConfigError(
            f"{BATCH} = {batch}, as saved, is no multiple of local_batch_size {job.training.local_batch_size} ×"
            f" {degree} data-parallel ranks: choose a training.local_batch_size that divides {batch / degree:g}"
        )
    streams = job.data.streams if job.data.streams > 0 else saved.get(STREAMS, batch)
    validation = job.validation.global_batch_size
    if validation == -1:
        validation = job.validation.local_batch_size * degree
    settled = replace(
        job,
        training=replace(job.training, global_batch_size=batch),
        data=replace(job.data, streams=streams),
        validation=replace(job.validation, global_batch_size=validation),
    )
    return settled, notes


def batch_note(job: JobConfig, batch: int, degree: int, was_saved: bool) -> str:
    """Where a derived global batch came from."""
    if was_saved:
        return f"{BATCH} = -1: {batch} rows, kept from the checkpoint"
    local = job.training.local_batch_size
    return (
        f"{BATCH} = -1: {batch} rows ({local} local × {degree} data-parallel); it follows the layout:"
        f" set it to {batch} for the same results on any"
    )
