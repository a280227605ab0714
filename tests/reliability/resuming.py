"""Jobs of the resume matrix: packed text, read by two tiny models, and what each step of a run came to.

The Trainer as it is, but for writing down each row of each step with its cursor.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.layouts.layout import Layout
from tests.ranks import run_ranks
from tests.trainer.runs import meeting_point

COMMON = (
    f"--experimental.custom_import={__package__}.resume_models",
    "--training.dataset=c4_test",
    "--training.seq_len=48",
    "--training.global_batch_size=8",
    "--training.steps=6",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.eps=1e-5",
    "--activation_checkpoint.mode=none",
    "--data.document_mask",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--debug.seed=7",
)


@dataclass(frozen=True)
class Step:
    """What a step came to."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    rows: tuple[str, ...]
    """A digest of each row of the global batch, in order: its tokens, labels, positions, documents, and its cursor."""


def run(layout: Layout, folder: Path, start: Path | None = None, timeout: float = 200) -> list[Step]:
    """The steps of a job, from the checkpoint `start` on if there is one. All ranks must tell the same."""
    if start is not None:
        shutil.copytree(start, folder / "checkpoint" / start.name)
    family, flavor = layout.model.split("/")
    model = (f"--model.name=resume_{family}", f"--model.flavor={flavor}")
    argv = [*COMMON, *model, *layout._layout(), *layout._modify(), f"--job.dump_folder={folder}"]
    told = run_ranks(layout.ranks, record, argv, meeting_point(), backend=None, timeout=timeout)
    steps = [_whole([rank[place] for rank in told]) for place in range(len(told[0]))]
    assert len({len(rank) for rank in told}) == 1
    return steps


def _whole(ranks: list[tuple[Step, dict[int, str]]]) -> Step:
    """One step from what the ranks tell of it."""
    step, rows = ranks[0][0], {}
    for other, part in ranks:
        assert other == step
        for number, digest in part.items():
            assert rows.setdefault(number, digest) == digest, f"two ranks read row {number} otherwise"
    assert sorted(rows) == list(range(8))
    return replace(step, rows=tuple(rows[number] for number in range(8)))


def record(argv: list[str], environ: dict[str, str]) -> list[tuple[Step, dict[int, str]]]:
    """One rank: train, and tell of each step, and of this rank's rows by their numbers in the batch."""
    from components.runtime import distributed
    from trainer.command import import_custom, validate_job
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    os.environ.update(environ)
    distributed.RETRY_SECONDS = 0.02
    told: list[tuple[Step, dict[int, str]]] = []

    class Recording(Trainer):
        """Writes down, changes nothing."""

        def train_step(self, rows: Any) -> Any:
            fields = (rows.batch.tokens, rows.batch.labels, rows.batch.positions, rows.batch.document_ids)
            digests = {
                self.dims.data_rank + self.dims.data_degree * j: _digest([x[j] for x in (*fields, rows.cursors)])
                for j in range(len(rows.cursors))
            }
            values = super().train_step(rows)
            assert values is not None
            step = Step(self.progress.step, float(values.loss), float(values.grad_norm), self.progress.tokens, ())
            told.append((step, digests))
            return values

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    validate_job(resolved, int(os.environ["WORLD_SIZE"]))
    trainer = Recording(resolved, os.environ)
    trainer.train()
    trainer.close()
    return told


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(repr([value.tolist() for value in values]).encode()).hexdigest()[:16]
