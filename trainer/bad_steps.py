"""Steps whose loss or gradient is not finite, or far above those before: found before the optimizer step, and met by
stopping, skipping, or going back to the last checkpoint and passing over the batch when it comes again.

The verdict depends on the global loss, the global gradient norm and those of the steps before. Whether these are finite
is the same everywhere, so that every rank takes the same turn without asking; by how much one is above the others may
differ in the last bit, so there rank 0's numbers count. Only a bad step is worth more, to say where it came from. What
the verdict depends on is saved with the job, so that a resumed run decides alike.

What is passed over is saved with the job too. Until the next checkpoint it stands in `passed_over.json`: a checkpoint
is never written into, and a job that is killed right after it has gone back must not meet the step again. Rejected: to
save anew after going back, which costs a checkpoint; and to rely on the step being bad again, which holds for bad data
but not for a bad memory cell.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from components.config.training import Training
from components.metrics.meter import StepValues
from components.runtime.distributed import of_first_rank
from components.runtime.errors import EspalierError, NonFiniteError, SpikeError
from components.runtime.logging import logger
from trainer import nonfinite

if TYPE_CHECKING:
    from trainer.parts import Progress
    from trainer.trainer import StepFacts, Trainer

MAX_ROLLBACKS = 10
"""How often a job goes back to one and the same checkpoint before it stops."""
NOTE = "passed_over.json"
Kind = Literal["ok", "nonfinite", "spike"]
Pair = list[float]
"""Loss and gradient norm of a step."""


@dataclass(frozen=True)
class Verdict:
    """What a step is judged to be, and the medians that it was compared with (None: with none)."""

    kind: Kind
    loss: float
    norm: float
    median_loss: float | None = None
    median_norm: float | None = None


@dataclass(frozen=True)
class Judge:
    """Decides from plain numbers. `window`: accepted steps to compare with; 0: nothing is a spike."""

    window: int
    loss_factor: float
    norm_factor: float

    @classmethod
    def of(cls, config: Training) -> Judge:
        """As `[training]` says."""
        window = 0 if config.on_spike == "ignore" else config.spike_window
        return cls(window, config.spike_loss_factor, config.spike_grad_norm_factor)

    def judge(self, loss: float, norm: float, recent: Sequence[Pair]) -> Verdict:
        """Not finite; a spike: above the median of the last `window` steps times its factor; or ok, also on the bound.

        `recent`: loss and norm of accepted steps, oldest first. Nothing is a spike before there are `window`, nor
        against a median that is not positive, which has no factor.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Verdict("nonfinite", loss, norm)
        if not self.window or len(recent) < self.window:
            return Verdict("ok", loss, norm)
        usual_loss, usual_norm = (median(values) for values in zip(*recent[-self.window :], strict=True))
        high = _above(loss, usual_loss, self.loss_factor) or _above(norm, usual_norm, self.norm_factor)
        return Verdict("spike" if high else "ok", loss, norm, usual_loss, usual_norm)

    def remember(self, loss: float, norm: float, recent: Sequence[Pair]) -> list[Pair]:
        """The history after an accepted step: no longer than the window, empty without one."""
        return [*recent, [loss, norm]][-self.window :] if self.window else []

    def explain(self, verdict: Verdict) -> str:
        """What makes a step a spike, in words."""
        found = (
            ("loss", verdict.loss, verdict.median_loss, self.loss_factor),
            ("gradient norm", verdict.norm, verdict.median_norm, self.norm_factor),
        )
        return " and ".join(
            f"{name} {value} is above {factor:g} × {usual}"
            for name, value, usual, factor in found
            if usual is not None and _above(value, usual, factor)
        )


def _above(value: float, usual: float, factor: float) -> bool:
    return usual > 0 and value > usual * factor


class BadSteps:
    """What one job does about bad steps. Everything here is done on all ranks alike, inside a section of the gate."""

    def __init__(self, trainer: Trainer) -> None:
        """Takes up what the last run of the job has left of its passing over."""
        self.trainer = trainer
        self.judge = Judge.of(trainer.job.training)
        self._note = Path(trainer.dump_folder) / NOTE
        source = trainer.persistence.source
        if source is not None and source.own and not source.model_only:
            created = source.manifest.created
            noted = trainer.persistence.store.ranks.on_first(lambda: self._noted(trainer.progress.step, created))
            self._avoid(trainer.progress, noted)

    def accept(self, facts: StepFacts) -> Verdict:
        """Judge a step; one that is ok enters the history. Collective where spikes are looked for.

        What is compared must be the same to the last bit: ranks of different groups may have added in another order.
        """
        progress = self.trainer.progress
        loss, norm = _numbers(facts.values)
        if self.judge.window:
            loss, norm = of_first_rank((loss, norm))
        verdict = self.judge.judge(loss, norm, progress.recent)
        if verdict.kind == "ok":
            progress.recent = self.judge.remember(loss, norm, progress.recent)
        return verdict

    def passes_over(self, step: int) -> bool:
        """Whether a step's batch is not to be trained on."""
        return step in self.trainer.progress.passed_over

    def handle(self, verdict: Verdict, facts: StepFacts) -> bool:
        """Do about a bad step what the policy says. True: the job has gone back, and goes on from its progress.

        False: the step is to be skipped. Raises NonFiniteError or SpikeError to stop. Collective.
        """
        config = self.trainer.job.training
        policy = config.on_nonfinite if verdict.kind == "nonfinite" else config.on_spike
        text = self._describe(verdict, facts)
        if policy == "stop":
            self._stop(verdict, text)
        if policy == "rollback":
            to_step = self.trainer.persistence.newest()
            if to_step is not None:
                self._roll_back(verdict, text, to_step)
                return True
            if self.trainer.early:
                self._stop(verdict, text, "; there is no checkpoint yet")
        none = "no checkpoint to go back to yet: " if policy == "rollback" else ""
        self._say("%sskipped, weights are unchanged: %s", none, text)
        self._record("skipped_step", verdict, reason=none + text)
        return False

    def pass_over(self) -> StepValues:
        """Count a step whose batch is passed over. Its loss is not computed, and not reported."""
        step = self.trainer.progress.step
        self._say("step %d: its batch is passed over, weights are unchanged", step)
        self.trainer.sinks.note({"event": "passed_over", "step": step})
        return StepValues(math.nan, math.nan, math.nan)

    def _roll_back(self, verdict: Verdict, text: str, to_step: int) -> None:
        """Bring all parts back to a checkpoint, the offending step to be passed over from now on."""
        trainer, step = self.trainer, self.trainer.progress.step
        passed = [*trainer.progress.passed_over, step]
        if sum(earlier > to_step for earlier in passed) > MAX_ROLLBACKS:
            self._stop(verdict, text, f"; the job has gone back to step-{to_step} {MAX_ROLLBACKS} times already")
        self._say("going back to step-%d, the batch of step %d will be passed over: %s", to_step, step, text)
        self._record("rolled_back", verdict, reason=text, to_step=to_step)
        created = trainer.persistence.store.read_manifest(to_step).created
        if trainer.world.rank == 0:
            self._write(to_step, created, passed)
        trainer.standing.phase = "load"
        with trainer.meter.pause():
            progress = trainer.persistence.reload(to_step, trainer.parts, trainer.identity)
        self._avoid(progress, passed)
        trainer.resettle(progress)

    def _avoid(self, progress: Progress, steps: Sequence[int]) -> None:
        progress.passed_over = sorted({*progress.passed_over, *steps})

    def _stop(self, verdict: Verdict, text: str, why: str = "") -> None:
        done = "before the optimizer step, weights are unchanged"
        if self.trainer.early:
            done = "but weights have moved (optimizer.early_step_in_backward): go back to a checkpoint"
        self._record("stopped_bad_step", verdict, reason=text + why)
        self.trainer.note_saves(self.trainer.persistence.finish())
        error: type[EspalierError] = NonFiniteError if verdict.kind == "nonfinite" else SpikeError
        what = "not finite" if verdict.kind == "nonfinite" else "spike"
        raise error(f"{what} {done}: {text}{why}")

    def _describe(self, verdict: Verdict, facts: StepFacts) -> str:
        """The step, its numbers, and the ranks on which it began. Collective."""
        trainer, step = self.trainer, self.trainer.progress.step
        local = float(facts.local_sums.sum())
        if verdict.kind == "nonfinite":
            where = nonfinite.first_nonfinite(pair for model in trainer.models for pair in model.named_parameters())
            return nonfinite.describe(step, verdict.loss, verdict.norm, local, where)
        compared = f"the median of the last {self.judge.window} accepted steps"
        return f"step {step}: {self.judge.explain(verdict)}, {compared} ({nonfinite.largest_losses(local)})"

    def _record(self, event: str, verdict: Verdict, **more: Any) -> None:
        config = self.trainer.job.training
        self.trainer.sinks.note(
            {
                "event": event,
                "step": self.trainer.progress.step,
                "kind": verdict.kind,
                "policy": config.on_nonfinite if verdict.kind == "nonfinite" else config.on_spike,
                "loss": verdict.loss,
                "grad_norm": verdict.norm,
                "median_loss": verdict.median_loss,
                "median_grad_norm": verdict.median_norm,
                **more,
            }
        )

    def _say(self, text: str, *values: object) -> None:
        if self.trainer.world.rank == 0:
            logger.warning(text, *values)

    def _write(self, to_step: int, created: str, steps: list[int]) -> None:
        """Note what is passed over after a checkpoint; without room for that the log says so, and the job goes on."""
        beside = self._note.with_name(NOTE + ".tmp")
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump({"checkpoint": to_step, "created": created, "steps": steps}, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._note)
        except OSError as error:
            logger.warning("%s cannot be written (%s): a kill before the next save forgets it", self._note, error)

    def _noted(self, step: int, created: str) -> list[int]:
        """The steps that a note says are passed over after this very checkpoint; a note on another is void."""
        try:
            note = json.loads(self._note.read_bytes())
            if (note["checkpoint"], note["created"]) == (step, created):
                return [int(number) for number in note["steps"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s cannot be read (%s): it is ignored", self._note, error)
        return []


def _numbers(values: StepValues) -> tuple[float, float]:
    return float(values.loss), float(values.grad_norm)
