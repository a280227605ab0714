"""What pipeline schedules there are and what each needs: arithmetic only, without torch, so that `check` can do it.

The schedules themselves are torch's (`torch.distributed.pipelining`); this is what they ask of a job, said before
anything is built. A schedule of one's own is a CSV file: a row for each pipeline rank, in it what the rank does, in
order: `0F2` is stage 0's forward of microbatch 2, `B` its backward, `I` and `W` a backward in two halves (for the
input, for the weights). It is played through here once, so that an order that would wait for itself is refused.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from components.config.nearest import did_you_mean
from components.config.parallelism import Parallelism
from components.runtime.errors import ConfigError

NAME = "parallelism.pipeline_parallel_schedule"
CSV = "parallelism.pipeline_parallel_schedule_csv"
SIZE = "parallelism.pipeline_parallel_microbatch_size"

BY_FILE = ("PipelineScheduleSingle", "PipelineScheduleMulti", "_PipelineScheduleRuntime")
"""Names that TorchTitan files give beside a CSV file. Here a CSV file decides by itself."""


@dataclass(frozen=True)
class Schedule:
    """One schedule, as far as a job must fit it."""

    name: str
    """As torch names it; case does not count."""
    shape: Literal["single", "loop", "v"]
    """single: one stage per rank. loop: two or more, dealt round and round. v: two, there and back."""
    fits: Callable[[int, int, int], str | None] = lambda microbatches, stages, pp: None
    """(microbatches, stages, ranks) → what it needs instead, or None."""
    splits: bool = False
    """Whether it computes gradients of weights apart from those of inputs."""

    @property
    def stages_per_rank(self) -> int:
        """Stages of each rank where no key says how many."""
        return 1 if self.shape == "single" else 2


def _at_least_stages(microbatches: int, stages: int, pp: int) -> str | None:
    return None if microbatches >= stages else f"needs at least as many microbatches as there are stages, {stages}"


def _whole_rounds(microbatches: int, stages: int, pp: int) -> str | None:
    rounds = max(1, microbatches // pp)
    if microbatches % rounds == 0:
        return None
    return f"goes in {rounds} rounds ({microbatches} // {pp} ranks), which must divide the number of microbatches"


SCHEDULES = {
    schedule.name.lower(): schedule
    for schedule in (
        Schedule("GPipe", "single"),
        Schedule("1F1B", "single", _at_least_stages),
        Schedule("LoopedBFS", "loop"),
        Schedule("Interleaved1F1B", "loop", _whole_rounds),
        Schedule("InterleavedZeroBubble", "loop", _whole_rounds, splits=True),
        Schedule("ZBVZeroBubble", "v", splits=True),
        Schedule("DualPipeV", "v", _at_least_stages, splits=True),
    )
}
"""By name in lower case."""


def find_schedule(name: str) -> Schedule:
    """The schedule of that name. Raises ConfigError that lists the names."""
    if name.lower() in SCHEDULES:
        return SCHEDULES[name.lower()]
    names = [schedule.name for schedule in SCHEDULES.values()]
    if name in BY_FILE:
        raise ConfigError(f'{NAME} = "{name}": needs a file; set {CSV}, or take one of {", ".join(names)}')
    raise ConfigError(
        f'{NAME} = "{name}": no such pipeline schedule; allowed: {", ".join(names)}{did_you_mean(name, names)}'
    )


def stage_ranks(parallelism: Parallelism, stages: int) -> list[int]:
    """The pipeline rank of each stage. Raises ConfigError for a file that cannot be used."""
    pp = parallelism.pipeline_parallel_degree
    if parallelism.pipeline_parallel_schedule_csv:
        return read_csv(Path(parallelism.pipeline_parallel_schedule_csv), pp).ranks
    if find_schedule(parallelism.pipeline_parallel_schedule).shape == "v":
        return [min(stage, 2 * pp - 1 - stage) for stage in range(stages)]
    return [stage % pp for stage in range(stages)]


def splits_backward(parallelism: Parallelism) -> bool:
    """Whether the schedule computes gradients of weights apart. Raises ConfigError for one that cannot be used."""
    if parallelism.pipeline_parallel_schedule_csv:
        path = Path(parallelism.pipeline_parallel_schedule_csv)
        return read_csv(path, parallelism.pipeline_parallel_degree).splits
    return find_schedule(parallelism.pipeline_parallel_schedule).splits


class Action(NamedTuple):
    """One cell of a file."""

    stage: int
    kind: str
    """F, B, I or W."""
    microbatch: int


@dataclass(frozen=True)
class FileSchedule:
    """A schedule of one's own."""

    ranks: list[int]
    """The pipeline rank of each stage."""
    microbatches: int
    """Microbatches that it is written for."""
    splits: bool
    """Whether any backward comes in two halves."""


def read_csv(path: Path, pp: int) -> FileSchedule:
    """Read and play through a file for `pp` ranks. Raises ConfigError that names the file and the row."""
    try:
        with path.open(newline="") as file:
            rows = [
                [action for cell in row for action in _actions(cell, path, n)]
                for n, row in enumerate(csv.reader(file), 1)
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{CSV} = "{path}": cannot be read: {error}') from error
    if len(rows) != pp:
        raise ConfigError(f'{CSV} = "{path}": has {len(rows)} rows, one for each of {pp} pipeline ranks is needed')
    owners: dict[int, set[int]] = {}
    for rank, row in enumerate(rows):
        for action in row:
            owners.setdefault(action.stage, set()).add(rank)
    if sorted(owners) != [*range(len(owners))] or len(owners) < pp or any(len(ranks) > 1 for ranks in owners.values()):
        shown = "; ".join(
            f"stage {stage}: row {', '.join(str(r + 1) for r in sorted(owners[stage]))}" for stage in sorted(owners)
        )
        raise ConfigError(
            f'{CSV} = "{path}": every stage from 0 on must be in one row alone, but there are {shown or "none"}'
        )
    microbatches = 1 + max(action.microbatch for row in rows for action in row)
    _require_complete(rows, len(owners), microbatches, path)
    _play(rows, len(owners), path)
    splits = any(action.kind == "W" for row in rows for action in row)
    return FileSchedule([owners[stage].pop() for stage in sorted(owners)], microbatches, splits)


def _actions(cell: str, path: Path, line: int) -> Iterator[Action]:
    """The actions of one cell: none, one, or several to overlap, `(0F1;1B0)OVERLAP_F_B`."""
    cell = cell.strip()
    inside = re.fullmatch(r"\((.*)\)OVERLAP_F_B", cell)
    for text in (inside[1] if inside else cell).split(";"):
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if match:
            yield Action(int(match[1]), match[2], int(match[3]))
        elif cell:
            raise ConfigError(
                f'{CSV} = "{path}": row {line}: {cell!r} is no action; allowed are stage, one of F B I W, microbatch,'
                " such as 0F2, and empty cells"
            )


def _require_complete(rows: list[list[Action]], stages: int, microbatches: int, path: Path) -> None:
    every = Counter(action for row in rows for action in row)
    if twice := next((action for action, times in every.items() if times > 1), None):
        raise ConfigError(f'{CSV} = "{path}": {_shown(twice)} is there twice')
    for stage in range(stages):
        for n in range(microbatches):
            kinds = "".join(kind for kind in "FBIW" if Action(stage, kind, n) in every)
            if kinds not in ("FB", "FIW"):
                raise ConfigError(
                    f'{CSV} = "{path}": stage {stage} does {kinds or "nothing"} with microbatch {n}; it must do F'
                    " and B, or F, I and W"
                )


def _play(rows: list[list[Action]], stages: int, path: Path) -> None:
    """Let all ranks go on as far as they can. Raises ConfigError if they do not come to the end."""
    done: set[Action] = set()
    places = [0] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while places[rank] < len(row) and _ready(row[places[rank]], stages, done):
                done.add(row[places[rank]])
                places[rank], moved = places[rank] + 1, True
    stuck = [
        f"row {r + 1} at {_shown(row[at])}"
        for r, (row, at) in enumerate(zip(rows, places, strict=True))
        if at < len(row)
    ]
    if stuck:
        raise ConfigError(f'{CSV} = "{path}": the ranks would wait for each other for ever: {", ".join(stuck)}')


def _ready(action: Action, stages: int, done: set[Action]) -> bool:
    stage, kind, n = action
    if kind == "W":
        return Action(stage, "I", n) in done
    if kind == "F":
        return stage == 0 or Action(stage - 1, "F", n) in done
    last = stage == stages - 1
    return Action(stage, "F", n) in done and (last or any(Action(stage + 1, k, n) in done for k in "BI"))


def _shown(action: Action) -> str:
    return f"{action.stage}{action.kind}{action.microbatch}"


def pipeline_problems(parallelism: Parallelism, local_batch_size: int) -> Iterator[str]:
    """Why the schedule cannot run on that many rows at a time; a line each. Nothing without pipeline parallelism."""
    pp, size = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_microbatch_size
    if pp == 1:
        return
    microbatches = None if local_batch_size % size else local_batch_size // size
    if microbatches is None:
        yield (
            f"{SIZE} = {size}: must divide the training.local_batch_size = {local_batch_size} rows that the pipeline"
            f" takes at a time; take {max(n for n in range(1, size) if local_batch_size % n == 0)}"
        )
    try:
        found = _file_or_schedule(parallelism)
    except ConfigError as error:
        yield from error.problems
        return
    if microbatches is None:
        return
    given = f"{microbatches} (training.local_batch_size {local_batch_size} // {SIZE} {size})"
    if isinstance(found, FileSchedule):
        if found.microbatches != microbatches:
            yield (
                f'{CSV} = "{parallelism.pipeline_parallel_schedule_csv}": is written for {found.microbatches}'
                f" microbatches, but there are {given}"
            )
    elif wanted := found.fits(microbatches, pp * found.stages_per_rank, pp):
        rows = _mended(found, microbatches, pp) * size
        yield f'{NAME} = "{found.name}": {wanted}; there are {given}: set training.local_batch_size to {rows}'


def _file_or_schedule(parallelism: Parallelism) -> FileSchedule | Schedule:
    """What decides the order. Raises ConfigError for what cannot be used."""
    if parallelism.pipeline_parallel_schedule_csv:
        return read_csv(Path(parallelism.pipeline_parallel_schedule_csv), parallelism.pipeline_parallel_degree)
    return find_schedule(parallelism.pipeline_parallel_schedule)


def _mended(schedule: Schedule, microbatches: int, pp: int) -> int:
    """The next larger number of microbatches that the schedule takes."""
    while schedule.fits(microbatches, pp * schedule.stages_per_rank, pp):
        microbatches += 1
    return microbatches
