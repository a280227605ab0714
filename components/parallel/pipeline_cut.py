"""Where a pipeline cuts a model: which modules each stage holds. Arithmetic only, without torch, for `check`.

By default stages get the same number of layers, where embedding and head count as
`pipeline_parallel_first_stage_less_layers` and `…_last_stage_less_layers` layers. What does not divide goes to the
stages with the least to compute. A finer balance by measured times was rejected: where the cuts lie would then depend
on the machine. `module_fqns_per_model_part` says it all by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.config.nearest import did_you_mean
from components.config.parallelism import Parallelism
from components.parallel.pipeline_schedules import CSV, NAME, find_schedule, stage_ranks
from components.runtime.errors import ConfigError

DEGREE = "parallelism.pipeline_parallel_degree"
PARTS = "parallelism.module_fqns_per_model_part"
PER_STAGE = "parallelism.pipeline_parallel_layers_per_stage"
FIRST_LESS = "parallelism.pipeline_parallel_first_stage_less_layers"
LAST_LESS = "parallelism.pipeline_parallel_last_stage_less_layers"

Cost = tuple[float, int]
"""What a module costs, to compare by: FLOPs of a token, in any unit, then parameters."""


@dataclass(frozen=True)
class Modules:
    """A model's modules in the order in which they run."""

    before: tuple[str, ...]
    """What comes before the layers: the embedding."""
    layers: tuple[str, ...]
    """The repeated blocks."""
    after: tuple[str, ...]
    """What follows them: norm and head."""

    @classmethod
    def expand(cls, order: Sequence[str], n_layers: int) -> "Modules":
        """Of a plan's `order`, where `*` stands for the numbers of the layers."""
        stars = [place for place, name in enumerate(order) if "*" in name]
        first = stars[0] if stars else len(order)
        layers = [name.replace("*", str(i)) for name in order if "*" in name for i in range(n_layers)]
        plain = [(place, name) for place, name in enumerate(order) if "*" not in name]
        before, after = (tuple(n for p, n in plain if (p < first) == early) for early in (True, False))
        return cls(before, tuple(layers), after)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (*self.before, *self.layers, *self.after)


@dataclass(frozen=True)
class Cut:
    """A model in stages."""

    parts: tuple[tuple[str, ...], ...]
    """The names of each stage's modules, in order."""
    ranks: tuple[int, ...]
    """The pipeline rank that runs each stage."""


def cut_modules(parallelism: Parallelism, modules: Modules, costs: Mapping[str, Cost] | None = None) -> Cut:
    """The stages of a model. Raises ConfigError, each line led by a dotted key, for what cannot be.

    Args:
        parallelism: The keys `pipeline_parallel_*` and `module_fqns_per_model_part`.
        modules: The model's.
        costs: Of each module, to place layers that do not divide. What can be cut does not depend on it.
    """
    given = parallelism.module_fqns_per_model_part
    if given:
        _require_exact(given, modules)
        count, key = len(given), f"{PARTS} = {len(given)} parts"
        parts = [tuple(part) for part in given]
    else:
        count, key = _count(parallelism, len(modules.layers))
        parts = []
    _require_shape(parallelism, count, key)
    parts = parts or _balanced(parallelism, modules, count, costs or {})
    return Cut(tuple(parts), tuple(stage_ranks(parallelism, count)))


def cut_problems(parallelism: Parallelism, order: Sequence[str], n_layers: int) -> list[str]:
    """Why a model with this plan's `order` and so many layers cannot be cut as the keys say; empty if it can."""
    if parallelism.pipeline_parallel_degree == 1:
        return []
    try:
        cut_modules(parallelism, Modules.expand(order, n_layers))
    except ConfigError as error:
        return [line for line in error.problems if not _is_schedules(line)]
    return []


def _is_schedules(line: str) -> bool:
    """Whether the rule on schedules, which needs no model, has told the same already."""
    return line.startswith(f"{CSV} = ") or (line.startswith(f"{NAME} = ") and "stages per rank" not in line)


def _count(parallelism: Parallelism, layers: int) -> tuple[int, str]:
    """The number of stages, and the key and value that it follows from."""
    pp, per_stage = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_layers_per_stage
    if per_stage is not None:
        units = layers + sum(_less(parallelism))
        return -(-units // per_stage), f"{PER_STAGE} = {per_stage}"
    if parallelism.pipeline_parallel_schedule_csv:
        return len(stage_ranks(parallelism, 0)), f'{CSV} = "{parallelism.pipeline_parallel_schedule_csv}"'
    each = find_schedule(parallelism.pipeline_parallel_schedule).stages_per_rank
    return pp * each, f"{DEGREE} = {pp}"


def _require_shape(parallelism: Parallelism, count: int, key: str) -> None:
    """Raise ConfigError unless the schedule takes that many stages."""
    pp = parallelism.pipeline_parallel_degree
    if parallelism.pipeline_parallel_schedule_csv:
        wanted = len(stage_ranks(parallelism, count))
        if wanted != count:
            raise ConfigError(f"{key}: makes {count} stages, but the schedule in {CSV} has {wanted}")
        return
    if count % pp:
        raise ConfigError(
            f"{key}: makes {count} stages, which {pp} pipeline ranks cannot share evenly; make a multiple of {pp}"
        )
    schedule, each = find_schedule(parallelism.pipeline_parallel_schedule), count // pp
    fits = {"single": each == 1, "loop": each >= 2, "v": each == 2}[schedule.shape]
    if not fits:
        wanted = {"single": "1", "loop": "2 or more", "v": "2"}[schedule.shape]
        raise ConfigError(
            f"{key}: makes {count} stages on {pp} pipeline ranks, {each} stages per rank, but schedule {schedule.name}"
            f" takes {wanted}; change one of the two"
        )


def _require_exact(parts: Sequence[Sequence[str]], modules: Modules) -> None:
    """Raise ConfigError unless the parts are the model's modules, each once, in order."""
    listed, names = [name for part in parts for name in part], modules.names
    unknown = [name for name in listed if name not in names]
    missing = [name for name in names if name not in listed]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    problems = [f"{PARTS}: {name} is no module of this model{did_you_mean(name, names)}" for name in unknown]
    problems += [
        f"{PARTS}: {what}: {', '.join(found)}"
        for what, found in (("in no part", missing), ("in it twice", twice))
        if found
    ]
    problems += [f"{PARTS}: part {n} is empty; give it a module" for n, part in enumerate(parts) if not part]
    if not problems and listed != [*names]:
        wrong = next(name for name, right in zip(listed, names, strict=True) if name != right)
        problems = [f"{PARTS}: {wrong} is out of order; the order is {', '.join(names)}"]
    if problems:
        raise ConfigError(*problems)


def _less(parallelism: Parallelism) -> tuple[int, int]:
    return (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )


def _balanced(
    parallelism: Parallelism, modules: Modules, count: int, costs: Mapping[str, Cost]
) -> list[tuple[str, ...]]:
    sizes = _sizes(parallelism, len(modules.layers), count)
    heads, tails = [modules.before, *[()] * (count - 1)], [*[()] * (count - 1), modules.after]
    spare = len(modules.layers) - sum(sizes)
    each = _total(modules.layers, costs, len(modules.layers))
    while spare:
        ends = [_total((*h, *t), costs) for h, t in zip(heads, tails, strict=True)]
        loads = [(end[0] + n * each[0], end[1] + n * each[1]) for end, n in zip(ends, sizes, strict=True)]
        sizes[loads.index(min(loads))] += 1
        spare -= 1
    starts = [sum(sizes[:stage]) for stage in range(count)]
    middles = [modules.layers[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return [(*h, *m, *t) for h, m, t in zip(heads, middles, tails, strict=True)]


def _sizes(parallelism: Parallelism, layers: int, count: int) -> list[int]:
    """Layers that every stage gets at least. Raises ConfigError where there are too few for so many stages."""
    first, last = _less(parallelism)
    base, needed = (layers + first + last) // count, max(1, first, last)
    if base < needed:
        raise ConfigError(
            f"{DEGREE} = {parallelism.pipeline_parallel_degree}: {layers} layers are too few for {count} stages: with"
            f" {FIRST_LESS} = {first} and {LAST_LESS} = {last} a stage has room for ({layers} + {first} + {last}) //"
            f" {count} = {base}, but needs {needed}; take fewer ranks or stages, or lower the two"
        )
    sizes = [base] * count
    sizes[0] -= first
    sizes[-1] -= last
    return sizes


def _total(names: Sequence[str], costs: Mapping[str, Cost], over: int = 1) -> Cost:
    found = [costs.get(name, (0.0, 0)) for name in names]
    return sum(cost[0] for cost in found) / over, sum(cost[1] for cost in found) // over
