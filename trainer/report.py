"""What a run says of itself: a few lines at its start, and files that let it be understood and repeated later."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.runtime import distributed
from components.runtime.errors import UserError
from components.runtime.logging import logger
from components.runtime.provenance import git_revision, versions
from trainer.config.output import to_toml
from trainer.run_folder import restart_count
from trainer.validator import Validator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from trainer.config.load import ResolvedJob
    from trainer.trainer import Trainer


def save_run(trainer: Trainer, resolved: ResolvedJob) -> None:
    """Write `config.toml` (every resolved value) and `run.json` (command, versions, revision, layout).

    A resumed run writes them again: they describe the newest run of the folder. Raises UserError if that fails.
    """
    if trainer.world.rank != 0:
        return
    job = trainer.job.job
    text = to_toml(trainer.job)
    facts = {
        "command": sys.argv,
        "description": job.description,
        "revision": git_revision(),
        "versions": versions(),
        "layout": trainer.identity.layout,
        "resumed_from": trainer.progress.step or None,
        "set_by": {key: source for key, source in resolved.provenance.items() if source != "default"},
    }
    files = {"config.toml": text, "run.json": json.dumps(facts, indent=1) + "\n"}
    if job.save_config_file:
        files[job.save_config_file] = text
    for name, content in files.items():
        write(trainer.dump_folder / name, content)


def write(path: Path, content: str) -> None:
    """Write a text file, its folder made if missing. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def describe_job(trainer: Trainer, notes: list[str]) -> None:
    """Log what is about to run."""
    job, degrees = trainer.job, trainer.dims.degrees
    if restarts := restart_count():
        logger.warning("a rank has failed: all of them have been started again (restart %d)", restarts)
    for note in notes:
        logger.info("note: %s", note)
    logger.info("%s: %s", job.job.description, trainer.dump_folder)
    logger.info(
        "model: %s %s, %s parameters, compute in %s",
        job.model.name,
        job.model.flavor,
        f"{trainer.spec.args_for_job_fn(trainer.args, job).parameter_count():,}",
        str(trainer.dtype).removeprefix("torch."),
    )
    accumulation = job.training.global_batch_size // (job.training.local_batch_size * degrees.batch)
    logger.info(
        "layout: %d × %s, %s; %d rows of %d tokens a step, %d × %d on each rank",
        degrees.world,
        trainer.device.type,
        degrees,
        job.training.global_batch_size,
        job.training.seq_len,
        accumulation,
        job.training.local_batch_size,
    )


Total = Callable[[Tensor], Tensor]
"""Adds up a rank's whole numbers over all ranks that read different rows. Collective."""


def tell_data(trainer: Trainer) -> None:
    """Log and note what this run's rows were made of: how full they were, what each source has given since the job
    began, and what was left out and why. Collective."""
    group = trainer.dims.group("batch")
    _tell_data(trainer, lambda numbers: distributed.all_reduce_sum(numbers.to(trainer.device), group))


def tell_data_at_a_stop(trainer: Trainer, group: ProcessGroup | None) -> None:
    """The same from beside the training thread, which may be anywhere: over `group`, of all ranks. Collective."""
    degrees, rank = trainer.dims.degrees, trainer.dims.rank
    share = degrees.cp * degrees.tp  # ranks with the same rows, of which one counts
    counts = rank < degrees.batch * share and rank % share == 0
    _tell_data(trainer, lambda numbers: distributed.all_reduce_sum(numbers.cpu() * counts, group))


def _tell_data(trainer: Trainer, total: Total) -> None:
    loader = trainer.loader
    skipped, here = loader.skipped(), loader.report()  # of the same sources on all ranks
    names = ("row_tokens", "padding_tokens", "dropped_documents", "targetless_documents")
    numbers = torch.tensor([*(here[x] for x in names), *skipped.values()])
    places, padding, dropped, targetless, *counts = total(numbers).tolist()
    given = _mixture(trainer, total)
    unit, whole = trainer.job.data.unit, sum(given.values())
    mixed = ""
    if len(given) > 1 and whole:
        shares = ", ".join(f"{name} {count / whole:.1%}" for name, count in given.items())
        mixed = f"; of the {unit} of finished documents: {shares}"
    if padding or mixed:
        logger.info("data: rows were filled to %s%s", f"{1 - padding / max(places, 1):.1%}", mixed)
    if dropped:
        logger.info("documents that were left out, longer than a row: %d", dropped)
    if targetless:
        logger.info("documents that were left out, without a token that a loss is taken at: %d", targetless)
    if padding or mixed or dropped or targetless:
        left_out = {"dropped_documents": dropped, "targetless_documents": targetless}
        filled = {"rows_filled": 1 - padding / max(places, 1), **left_out, "sources": given}
        trainer.sinks.note({"event": "data", "step": trainer.settled.step, **filled})
    held_out = _skipped_held_out(trainer, total)
    _tell_skipped(trainer, dict(zip(skipped, counts, strict=True)), held_out)


def _mixture(trainer: Trainer, total: Total) -> dict[str, int]:
    """What each source has given since the job began, by the cursors of all ranks' rows; empty if nobody knows."""
    cursors, dims = trainer.settled.cursors, trainer.dims
    if cursors is None:
        return {}
    table = cursors.new_zeros(trainer.loader.global_batch, cursors.shape[1])
    table[dims.data_rank :: dims.data_degree] = cursors
    return trainer.loader.mixture(total(table).tolist())


def _skipped_held_out(trainer: Trainer, total: Total) -> dict[str, int]:
    """Records of each validation set that could not be read in the last pass over it, which are those of any pass."""
    if not isinstance(trainer.validator, Validator):
        return {}
    here = {name: sum(loader.skipped().values()) for name, loader in trainer.validator.loaders.items()}
    return dict(zip(here, total(torch.tensor(list(here.values()))).tolist(), strict=True))


def _tell_skipped(trainer: Trainer, counts: dict[str, int], held_out: dict[str, int]) -> None:
    """`counts`: by source; `held_out`: by validation set."""
    if not any(counts.values()) and not any(held_out.values()):
        return
    for what, numbers in (("records", counts), ("validation records", held_out)):
        found = ", ".join(f"{name} {count}" for name, count in numbers.items() if count and name)
        if whole := sum(numbers.values()):
            told = f" ({found})" if found else ""
            logger.info("%s that could not be read and were skipped: %d%s", what, whole, told)
    event = {"event": "skipped_records", "step": trainer.settled.step, "sources": counts}
    trainer.sinks.note(event | ({"validation": held_out} if any(held_out.values()) else {}))
