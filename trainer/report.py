"""What a run says of itself: a few lines at its start, and files that let it be understood and repeated later."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from components.runtime import distributed
from components.runtime.errors import UserError
from components.runtime.logging import logger
from components.runtime.provenance import git_revision, versions
from trainer.config.output import to_toml
from trainer.run_folder import restart_count

if TYPE_CHECKING:
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


def tell_data(trainer: Trainer) -> None:
    """Log and note what this run's rows were made of: how full they were, what each source has given since the job
    began, and what could not be read or was too long. Collective."""
    loader, group = trainer.loader, trainer.dims.group("batch")
    skipped, here = loader.skipped(), loader.report()  # of the same sources on all ranks
    numbers = [here["row_tokens"], here["padding_tokens"], here["dropped_documents"], *skipped.values()]
    totals = distributed.all_reduce_sum(torch.tensor(numbers, device=trainer.device), group).tolist()
    places, padding, dropped, *counts = totals
    given = _mixture(trainer)
    unit, whole = trainer.job.data.unit, sum(given.values())
    mixed = ""
    if len(given) > 1 and whole:
        shares = ", ".join(f"{name} {count / whole:.1%}" for name, count in given.items())
        mixed = f"; of the {unit} of finished documents: {shares}"
    if padding or mixed:
        logger.info("data: rows were filled to %s%s", f"{1 - padding / max(places, 1):.1%}", mixed)
    if dropped:
        logger.info("documents that were left out, longer than a row: %d", dropped)
    if padding or mixed or dropped:
        filled = {"rows_filled": 1 - padding / max(places, 1), "dropped_documents": dropped, "sources": given}
        trainer.sinks.note({"event": "data", "step": trainer.progress.step, **filled})
    _tell_skipped(trainer, dict(zip(skipped, counts, strict=True)))


def _mixture(trainer: Trainer) -> dict[str, int]:
    """What each source has given since the job began, by the cursors of all ranks' rows; empty if nobody knows."""
    cursors, dims = trainer.settled.cursors, trainer.dims
    if cursors is None:
        return {}
    table = cursors.new_zeros(trainer.loader.global_batch, cursors.shape[1], device=trainer.device)
    table[dims.data_rank :: dims.data_degree] = cursors.to(trainer.device)
    return trainer.loader.mixture(distributed.all_reduce_sum(table, dims.group("batch")).tolist())


def _tell_skipped(trainer: Trainer, counts: dict[str, int]) -> None:
    if not any(counts.values()):
        return
    found = ", ".join(f"{name} {count}" for name, count in counts.items() if count and name)
    told = f" ({found})" if found else ""
    logger.info("records that could not be read and were skipped: %d%s", sum(counts.values()), told)
    trainer.sinks.note({"event": "skipped_records", "step": trainer.progress.step, "sources": counts})
