"""A job that is killed, started again, killed … until it is done, and compared with one that nobody disturbed."""

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.harness import Blow, Call, Case, Ended, Mode, Op, Phase, committed, run
from tests.reliability.harness_jobs import SAVING, check_folder, job, load_all, put_foreign, same
from tests.trainer.runs import facts, records

STEPS = 6
KEPT = 2
WINDOWS = (Phase.WRITE, Phase.RENAME, Phase.DELETE)
KILLS = (Mode.KILL_BEFORE, Mode.KILL_WITHIN, Mode.KILL_AFTER)
KILLED = -9


@dataclass(frozen=True)
class Kill:
    """Where a process was when it was killed."""

    phase: Phase
    op: str
    resumed: int | None
    """The step that the killed run had come from, if it had got so far."""


def arguments(folder: Path, mode: str) -> list[str]:
    return [*SAVING, f"--training.steps={STEPS}", f"--checkpoint.async_mode={mode}", f"--job.dump_folder={folder}"]


@dataclass
class Reference:
    """The run that nobody disturbed."""

    folder: Path
    mode: str
    seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)

    def train(self) -> "Reference":
        ended = run(Case(job, (arguments(self.folder, self.mode),), self.folder / "checkpoint"))
        assert (ended.code, ended.value) == (0, 0), ended.log
        self.seconds, self.calls = ended.seconds, ended.calls
        assert committed(ended.calls) == [*range(1, STEPS + 1)]
        return self

    def calls_in(self, phase: Phase) -> int:
        """Calls in this part of the protocol, for one checkpoint."""
        return sum(call.phase == phase for call in self.calls) // (STEPS - KEPT if phase is Phase.DELETE else STEPS)


class Sweep:
    """One job, killed up to `at_most` times and then left to finish."""

    def __init__(self, folder: Path, reference: Reference, dice: random.Random) -> None:
        self.folder, self.reference, self.dice = folder, reference, dice
        self.root = folder / "checkpoint"
        self.newest: int | None = None
        self.kills: list[Kill] = []
        put_foreign(self.root)

    def go(self, at_most: int) -> list[Kill]:
        """Kill, check, start again; the kills."""
        while len(self.kills) < at_most:
            if self.newest == STEPS:
                break
            case = self.targeted() if self.dice.random() < 0.6 else self.at_random()
            ended = run(case)
            resumed = self.check(ended)
            if ended.code != KILLED:
                break
            self.kills.append(Kill(case.blow.phase or ended.phase, describe(ended.calls), resumed))
        self.finish()
        return self.kills

    def case(self, blow: Blow, kill_after: float | None = None) -> Case:
        return Case(job, (arguments(self.folder, self.reference.mode),), self.root, blow, kill_after)

    def targeted(self) -> Case:
        """Killed by its own hand at a drawn call of writing, renaming or deleting one of its first two checkpoints."""
        saves = STEPS - (self.newest or 0)
        full = min(self.newest or 0, KEPT) + saves - KEPT  # saves that delete
        phase = self.dice.choice(WINDOWS if full > 0 else WINDOWS[:2])
        number = self.dice.randrange(min(2, full if phase is Phase.DELETE else saves) * self.reference.calls_in(phase))
        return self.case(Blow(self.dice.choice(KILLS), number, phase, permille=self.dice.randrange(1000)))

    def at_random(self) -> Case:
        """Killed from outside, most likely while it still trains: a start is half of a run."""
        left = 1 - (self.newest or 0) / STEPS
        return self.case(Blow(), self.dice.uniform(0.2, 0.5 + left / 2) * self.reference.seconds)

    def check(self, ended: Ended) -> int | None:
        """What must hold after each run; the step that it had resumed from."""
        assert ended.code in (0, KILLED), ended.log
        assert ended.code or ended.value == 0, ended.log
        found = re.findall(r"^loaded step-(\d+)$", ended.log, re.MULTILINE)
        assert found in ([], [str(self.newest)]), f"{found} after {self.newest} had been saved\n{ended.log}"
        assert "falling back" not in ended.log
        steps = [*committed(ended.calls), *self.torn(ended.calls)]
        self.newest = max([self.newest or 0, *steps]) or None
        check_folder(self.root, self.newest)
        return int(found[0]) if found else None

    def torn(self, calls: list[Call]) -> list[int]:
        """The step that was being given its name, if it has it: the process died before it could say so."""
        last = [call for call in calls if call.error is None and call.op == Op.RENAME]
        names = [call.other for call in last if call.other.startswith("step-")]
        return [int(name[5:]) for name in names if (self.root / name).exists()]

    def finish(self) -> None:
        """Undisturbed to the end: the same losses and weights as if nothing had happened."""
        ended = run(self.case(Blow()))
        assert (ended.code, ended.value) == (0, 0), ended.log
        resumed = self.check(ended)
        assert self.newest == STEPS
        assert resumed is not None or not self.kills or committed(ended.calls)[0] == 1
        ours, theirs = records(self.folder), records(self.reference.folder)
        assert [record["step"] for record in ours] == [*range(1, STEPS + 1)]
        assert [facts(record) for record in ours] == [facts(record) for record in theirs]
        (weights, state), (expected, at) = (
            load_all(f / "checkpoint", STEPS) for f in (self.folder, self.reference.folder)
        )
        assert same(weights, expected)
        assert state == at


def describe(calls: list[Call]) -> str:
    """The call that a process died in or after."""
    return calls[-1].op.name.lower() if calls else "none"


def sweep(folder: Path, kills: int, modes: tuple[str, ...], seed: int) -> list[Kill]:
    """Jobs of all modes in turn, five kills each, until there were that many kills."""
    references = {mode: Reference(folder / f"whole-{mode}", mode).train() for mode in modes}
    found: list[Kill] = []
    number = 0
    while len(found) < kills:
        dice, mode = random.Random(f"{seed} {number}"), modes[number % len(modes)]
        found += Sweep(folder / f"{number}", references[mode], dice).go(min(5, kills - len(found)))
        number += 1
    return found


def distribution(kills: list[Kill]) -> dict[str, int]:
    """How many kills in each part of the protocol."""
    counts = Counter(kill.phase for kill in kills)
    return {phase.name.lower(): counts[phase] for phase in Phase}
