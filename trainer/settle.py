"""Keys that say "derive it" get their numbers here, once, before anything is built, so that nothing else knows of −1.

What follows the data-parallel degree is a fact of the first run: a resume keeps the number that was saved.
"""

from collections.abc import Mapping
from dataclasses import replace

from components.config.job_config import JobConfig
from components.runtime.errors import ConfigError

BATCH = "training.global_batch_size"
STREAMS = "data.streams"
VALIDATION_BATCH = "validation.global_batch_size"


def settle(job: JobConfig, degree: int, saved: Mapping[str, int]) -> tuple[JobConfig, list[str]]:
    """The job with its derived sizes, and a note for each that follows the layout.

    `degree` is the data-parallel degree, `saved` holds the sizes of the checkpoint that will be resumed (empty: none).
    Raises ConfigError for a size that was saved and does not fit this layout.
    """
    training, validation = job.training, job.validation
    batch, notes = rows(BATCH, training.global_batch_size, training.local_batch_size, degree, saved)
    streams = job.data.streams if job.data.streams > 0 else saved.get(STREAMS, batch)
    if validation.enable:
        local = validation.local_batch_size
        held_out, more = rows(VALIDATION_BATCH, validation.global_batch_size, local, degree, saved)
        validation, notes = replace(validation, global_batch_size=held_out), notes + more
    training, data = replace(training, global_batch_size=batch), replace(job.data, streams=streams)
    return replace(job, training=training, data=data, validation=validation), notes


def sizes(job: JobConfig) -> dict[str, int]:
    """What a settled job saves, for `settle` to keep."""
    found = {BATCH: job.training.global_batch_size, STREAMS: job.data.streams}
    return found | ({VALIDATION_BATCH: job.validation.global_batch_size} if job.validation.enable else {})


def rows(key: str, given: int, local: int, degree: int, saved: Mapping[str, int]) -> tuple[int, list[str]]:
    """The rows of a global batch, and a note if they were derived."""
    if given != -1:
        return given, []
    if key not in saved:
        derived = local * degree
        note = f"{derived} rows ({local} local × {degree} data-parallel); it follows the layout"
        return derived, [f"{key} = -1: {note}: set it to {derived} for the same results on any"]
    kept = saved[key]
    if kept % (local * degree):
        section = key.partition(".")[0]
        raise ConfigError(
            f"{key} = {kept}, as saved, is no multiple of local_batch_size {local} × {degree} data-parallel ranks:"
            f" choose a {section}.local_batch_size that divides {kept / degree:g}"
        )
    return kept, [f"{key} = -1: {kept} rows, kept from the checkpoint"]
