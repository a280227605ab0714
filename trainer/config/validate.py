"""Rules that concern several keys at once: does this job make sense, on that many ranks, for that model?

Each rule is a function that yields a line for each problem, naming the keys, their numbers and a mend; `RULES` lists
them. All run, so that all problems come at once. What one key allows by itself is its type's business, what a model
cannot do is its arguments' (`ModelArgs.problems`), and what the machine lacks is found when it is used.
"""

import math
import posixpath
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from components.config.annotations import hints_of, toml_literal
from components.config.checkpoint import Checkpoint
from components.config.job_config import JobConfig
from components.config.overlay import DEFAULT
from components.config.parallelism import Parallelism
from components.config.schema import get
from components.config.training import DataLoader
from components.mesh.degrees import Degrees, resolve_degrees
from components.optim.schedule import schedule_problems
from components.parallel.pipeline_schedules import pipeline_problems
from components.runtime.errors import ConfigError, MeshError
from components.runtime.urls import protocol_problem
from trainer.config.names import check_names, find_model
from trainer.config.one_process import one_process_problems
from trainer.config.sources import check_sources
from trainer.config.support import unsupported

if TYPE_CHECKING:
    from models.train_spec import ModelArgs
    from trainer.config.load import ResolvedJob

Problems = Iterator[str]

LOADABLE = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state", "rng")
"""Parts of a checkpoint, as `checkpoint.exclude_from_loading` names them."""

FOLDERS: Mapping[str, Callable[[JobConfig], str | None]] = {
    "job.save_config_file": lambda job: job.job.save_config_file,
    "profiling.save_traces_folder": lambda job: job.profiling.save_traces_folder,
    "profiling.save_memory_snapshot_folder": lambda job: job.profiling.save_memory_snapshot_folder,
    "metrics.save_tb_folder": lambda job: job.metrics.save_tb_folder,
    "checkpoint.folder": lambda job: job.checkpoint.folder,
    "checkpoint.export_folder": lambda job: job.checkpoint.export_folder,
    "comm.save_traces_folder": lambda job: job.comm.save_traces_folder,
}
"""Keys whose paths lie inside `job.dump_folder`."""

STORES = ("checkpoint.folder", "checkpoint.export_folder")
"""Those of them that may be URLs."""

UNPARTITIONED = ("eager", "eager_noexcept", "eager_debug")
"""Back ends of torch.compile that do not split a graph into forward and backward themselves."""

DEGREES = tuple(f"parallelism.{name}" for name in hints_of(Parallelism) if name.endswith("_degree"))
"""The keys that lay a job out over ranks."""

MODEL = ("model.name", "model.flavor")
"""The keys that choose a model's shape."""


def require_valid(resolved: "ResolvedJob", world_size: int) -> "ModelArgs | None":
    """The model's shape, None where only code that is not imported knows it.

    Raises ConfigError with every problem of the job on `world_size` ranks, each led by where its key was set: those of
    its files and arguments, then those of the job that they make. Of the latter, what speaks of a refused value is left
    out: it may be gone once that value is mended.
    """
    args, problems = find_model(resolved.job) if resolved.refused.isdisjoint(MODEL) else (None, [])
    problems += validate(resolved.job, world_size, args, resolved.refused)
    problems = [line for line in problems if not any(_mentions(line, key) for key in resolved.refused)]
    problems = [*resolved.problems, *located(problems, resolved.provenance | resolved.places)]
    if problems:
        raise ConfigError(*problems)
    return args


def validate(
    job: JobConfig, world_size: int, args: "ModelArgs | None", refused: Collection[str] = frozenset()
) -> list[str]:
    """Every problem of the job on `world_size` ranks; empty if there is none. Each line begins with a dotted key.

    `args` is the model's shape, None where it is not known: what needs it is then left out. So are the rules on the
    layout where one of the `refused` keys is a degree.
    """
    problems = [line for rule in RULES for line in rule(job)]
    if not any(key in refused for key in DEGREES):
        problems.extend(_layout(job, world_size))
    if args is not None:
        problems.extend(args.problems(job))
    return problems


def _layout(job: JobConfig, world_size: int) -> Problems:
    try:
        degrees = resolve_degrees(job.parallelism, world_size)
    except MeshError as error:
        yield _misfit(job, str(error))
    else:
        for rule in LAYOUT_RULES:
            yield from rule(job, degrees)


def _misfit(job: JobConfig, error: str) -> str:
    """Degrees that do not fit, told of one that is not the default (the defaults fit any number of ranks): if there is
    a choice, of one that the error names."""
    usual, values = JobConfig(), {key: get(job, tuple(key.split("."))) for key in DEGREES}
    suspects = [key for key, value in values.items() if value != get(usual, tuple(key.split(".")))]
    key = next((key for key in suspects if _mentions(error, key)), suspects[0])
    return f"{key} = {values[key]}: {error.removeprefix(f'`{key}` = {values[key]} ')}"


def _mentions(line: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", line) is not None


def located(problems: list[str], provenance: Mapping[str, str]) -> list[str]:
    """The same lines, each led by where the key that it begins with was set, or the nearest table or list around it
    whose place is known; a key left at its default stays as it is."""
    return [_located(line, provenance) for line in problems]


def _located(line: str, provenance: Mapping[str, str]) -> str:
    key = re.split(r"[ :]", line, maxsplit=1)[0]
    while key not in provenance and "[" in key:
        key = key[: max(key.rfind("."), key.rfind("["))]
    where = provenance.get(key, DEFAULT)
    if where == DEFAULT:
        return line
    if where.startswith("--"):  # the argument says key and value already
        line = re.sub(rf"^{re.escape(key)}( = .*?)?: ", "", line)
    return f"{where}: {line}"


def _batch(job: JobConfig, degrees: Degrees) -> Problems:
    sizes = {"training": (job.training.global_batch_size, job.training.local_batch_size)}
    if job.validation.enable:
        sizes["validation"] = (job.validation.global_batch_size, job.validation.local_batch_size)
    for section, (rows, local) in sizes.items():
        unit = local * degrees.batch
        if rows != -1 and rows % unit:
            below, above = rows // unit * unit, (rows // unit + 1) * unit
            yield (
                f"{section}.global_batch_size = {rows}: must be a multiple of {section}.local_batch_size ×"
                f" data-parallel degree = {local} × {degrees.batch} = {unit};"
                f" take {f'{below} or ' if below else ''}{above}, or another local_batch_size"
            )


def _streams(job: JobConfig, degrees: Degrees) -> Problems:
    rows, streams = job.training.global_batch_size, job.data.streams
    rows = job.training.local_batch_size * degrees.batch if rows == -1 else rows
    if streams != -1 and streams < rows:
        yield (
            f"data.streams = {streams}: must be at least the {rows} rows of a global batch, since row r comes from"
            f" stream r; take {rows} or more, or -1"
        )


def _sequence(job: JobConfig, degrees: Degrees) -> Problems:
    # Context parallelism deals each rank one chunk of a row or, from head and tail, two; tensor ranks cut a chunk.
    chunks = 2 if degrees.cp > 1 and job.parallelism.context_parallel_load_balancer == "headtail" else 1
    unit = degrees.tp * degrees.cp * chunks
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable:
        lengths["validation.seq_len"] = job.validation.seq_len
    for key, length in lengths.items():
        if length % unit:
            yield (
                f"{key} = {length}: must be a multiple of {unit}, for a tensor-parallel degree of {degrees.tp} and a"
                f" context-parallel degree of {degrees.cp}; take {(length // unit + 1) * unit}"
            )


def _fake_rank(job: JobConfig, degrees: Degrees) -> Problems:
    rank = job.comm.fake_rank
    if job.comm.mode == "fake_backend" and rank >= degrees.world:
        yield f"comm.fake_rank = {rank}: there are {degrees.world} ranks, counted from 0; take a lower one"


def _pipeline(job: JobConfig, degrees: Degrees) -> Problems:
    yield from pipeline_problems(job.parallelism, job.training.local_batch_size)


def _schedule(job: JobConfig) -> Problems:
    yield from schedule_problems(job.lr_scheduler)


def _loaders(job: JobConfig) -> Problems:
    loaders: dict[str, DataLoader] = {"training.dataloader": job.training.dataloader}
    if job.validation.enable:
        loaders["validation.dataloader"] = job.validation.dataloader
    for section, loader in loaders.items():
        if loader.num_workers > 0:
            continue
        needy = {"persistent_workers": loader.persistent_workers, "prefetch_factor": loader.prefetch_factor}
        for key, value in needy.items():
            if value:
                yield (
                    f"{section}.{key} = {toml_literal(value)}: needs workers, but {section}.num_workers is 0;"
                    f" set that to 1 or more, or leave this out"
                )


def _profiling(job: JobConfig) -> Problems:
    profiling = job.profiling
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        yield (
            f"profiling.profile_freq = {profiling.profile_freq}: must be at least profiler_warmup + profiler_active ="
            f" {profiling.profiler_warmup} + {profiling.profiler_active} = {cycle}"
        )


def _recompute(job: JobConfig) -> Problems:
    recompute = job.activation_checkpoint
    option = recompute.selective_ac_option
    if recompute.mode == "selective" and option != "op" and not (option.isdecimal() and int(option) > 0):
        yield (
            f"activation_checkpoint.selective_ac_option = {toml_literal(option)}: must be a positive integer in quotes"
            ' (every n-th block) or "op"'
        )
    if recompute.mode == "memory_budget":
        yield from _budget(job)
    if recompute.determinism_check not in ("default", "none"):
        shown = toml_literal(recompute.determinism_check)
        yield f'activation_checkpoint.determinism_check = {shown}: must be one of "default", "none"'


def _async_tensor(job: JobConfig) -> Problems:
    parallelism, compiled = job.parallelism, job.compile
    if not parallelism.enable_async_tensor_parallel or parallelism.tensor_parallel_degree == 1:
        return
    if not (compiled.enable and "model" in compiled.components and compiled.backend == "inductor"):
        yield (
            "parallelism.enable_async_tensor_parallel = true: it is inductor that overlaps, but it does not compile the"
            ' model; set compile.enable to true, with "model" in compile.components and compile.backend = "inductor",'
            " or this to false"
        )


def _budget(job: JobConfig) -> Problems:
    """The compiler is who keeps within a memory budget."""
    key, compiled = 'activation_checkpoint.mode = "memory_budget":', job.compile
    if not compiled.enable:
        yield f'{key} needs compiled blocks, but compile.enable is false; set that to true, or take "selective"'
    elif "model" not in compiled.components:
        shown = toml_literal(list(compiled.components))
        yield f'{key} needs compiled blocks, but compile.components = {shown}; add "model" there, or take "selective"'
    elif compiled.backend in UNPARTITIONED:
        yield (
            f"{key} compile.backend = {toml_literal(compiled.backend)} does not choose what is kept; take another one,"
            ' such as "inductor"'
        )


def _folders(job: JobConfig) -> Problems:
    for key, value in FOLDERS.items():
        path = value(job)
        if path is None:
            continue
        if key in STORES and "://" in path:
            if problem := protocol_problem(path):
                yield f"{key} = {toml_literal(path)}: {problem}"
            continue
        parts = PurePath(path).parts
        if not parts or PurePath(path).is_absolute() or ".." in parts:
            yield (
                f"{key} = {toml_literal(path)}: must be a relative path without .. that stays inside job.dump_folder ="
                f" {toml_literal(job.job.dump_folder)}"
            )


def _checkpoint(job: JobConfig) -> Problems:
    for part in job.checkpoint.exclude_from_loading:
        if part not in LOADABLE:
            yield f"checkpoint.exclude_from_loading = {toml_literal(part)}: must be out of {', '.join(LOADABLE)}"
    if job.checkpoint.resume == "never" and job.checkpoint.load_step != -1:
        yield (
            'checkpoint.resume = "never": nothing in checkpoint.folder is loaded, but checkpoint.load_step is'
            f' {job.checkpoint.load_step}; leave that out, or set this to "auto" or "must"'
        )
    start = job.checkpoint.initial_load_path or ""
    if "://" in start and (problem := protocol_problem(start)):
        yield f"checkpoint.initial_load_path = {toml_literal(start)}: {problem}"
    if job.checkpoint.create_seed_checkpoint:
        yield from _seed(job.checkpoint)
    if job.checkpoint.enable:
        yield from _hugging_face(job.checkpoint)


def _stores(job: JobConfig, degrees: Degrees) -> Problems:
    for key in STORES:
        path = FOLDERS[key](job) or ""
        if job.checkpoint.enable and path.startswith("memory://") and degrees.world > 1:
            told = f"{degrees.world} ranks do not share their memory; give a place that all of them reach"
            yield f"{key} = {toml_literal(path)}: {told}"


def _hugging_face(checkpoint: Checkpoint) -> Problems:
    key = "checkpoint.initial_load_in_hf = true:"
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None:
        yield f"{key} checkpoint.initial_load_path does not say where the weights are; set it, or this to false"
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        yield f"{key} nothing but weights is there, so checkpoint.initial_load_model_only cannot be false; leave it out"
    if checkpoint.initial_load_in_hf and "model" in checkpoint.exclude_from_loading:
        yield f'{key} checkpoint.exclude_from_loading has "model", so that nothing would be loaded; leave one out'
    exports = checkpoint.last_save_in_hf or checkpoint.export_interval
    if exports and not checkpoint.load_only and _same_folder(checkpoint.folder, checkpoint.export_folder):
        yield (
            f"checkpoint.export_folder = {toml_literal(checkpoint.export_folder)}: checkpoints are there already, under"
            " the same names; give it a folder other than checkpoint.folder"
        )


def _same_folder(one: str, other: str) -> bool:
    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return posixpath.normpath(one) == posixpath.normpath(other)


def _seed(checkpoint: Checkpoint) -> Problems:
    """What a job that only writes its initial weights cannot go with."""
    key = "checkpoint.create_seed_checkpoint = true:"
    if not checkpoint.enable:
        yield f"{key} nothing is saved while checkpoint.enable is false; set that to true"
    if checkpoint.load_only:
        yield f"{key} nothing is saved while checkpoint.load_only is true; set one of them to false"
    if checkpoint.initial_load_path is not None:
        shown = toml_literal(checkpoint.initial_load_path)
        yield f"{key} a seed holds fresh weights, not those of checkpoint.initial_load_path = {shown}; leave one out"
    if checkpoint.resume == "must":
        yield f'{key} a seed is the first checkpoint, but checkpoint.resume = "must" wants one; set that to "auto"'
    if checkpoint.load_step != -1:
        yield f"{key} nothing is loaded, but checkpoint.load_step is {checkpoint.load_step}; leave one out"


def _bad_steps(job: JobConfig) -> Problems:
    training, checkpoint = job.training, job.checkpoint
    for name, policy in (("on_nonfinite", training.on_nonfinite), ("on_spike", training.on_spike)):
        if policy == "rollback" and not (checkpoint.enable and not checkpoint.load_only):
            switch = "checkpoint.load_only is true" if checkpoint.enable else "checkpoint.enable is false"
            yield (
                f'training.{name} = "rollback": there is no checkpoint to go back to while {switch}; set that to'
                f' {"false" if checkpoint.enable else "true"}, or this to "skip"'
            )
    if training.on_spike == "ignore":
        return
    for name, factor in (
        ("spike_loss_factor", training.spike_loss_factor),
        ("spike_grad_norm_factor", training.spike_grad_norm_factor),
    ):
        if factor <= 1:
            yield f"training.{name} = {factor:g}: about half of all steps are above their median; set it above 1"


def _exit_after(job: JobConfig) -> Problems:
    """A job that ends by the clock must be able to save before, and have the time to."""
    limit, checkpoint = job.training.exit_after, job.checkpoint
    if not limit:
        return
    key = f"training.exit_after = {limit}:"
    if not checkpoint.enable:
        yield f"{key} nothing would be saved, since checkpoint.enable is false; set that to true, or this to 0"
    elif checkpoint.load_only:
        yield f"{key} nothing would be saved, since checkpoint.load_only is true; set that to false, or this to 0"
    elif limit <= checkpoint.grace_seconds:
        yield (
            f"{key} must be above checkpoint.grace_seconds = {checkpoint.grace_seconds}, by which the run stops before"
            " it; raise this, or lower that"
        )


def _early_step(job: JobConfig) -> Problems:
    if not job.optimizer.early_step_in_backward:
        return
    key, training = "optimizer.early_step_in_backward = true:", job.training
    if not math.isinf(training.max_norm):
        yield (
            f"{key} weights move before the norm of all gradients is known, so that nothing can be clipped to"
            f" training.max_norm = {training.max_norm:g}; set that to inf, or this to false"
        )
    for name, policy in (("on_nonfinite", training.on_nonfinite), ("on_spike", training.on_spike)):
        if policy == "skip":
            yield (
                f"{key} weights move before a step is known to be bad, so that none can be skipped; set"
                f' training.{name} to "stop" or "rollback", or this to false'
            )
    if job.debug.compare_ranks:
        yield f"{key} no gradient is left for debug.compare_ranks = {job.debug.compare_ranks}; set that to 0"


def _groups(job: JobConfig) -> Problems:
    for index, group in enumerate(job.optimizer.parameter_groups):
        try:
            re.compile(group.pattern)
        except re.error as error:
            shown = toml_literal(group.pattern)
            yield f"optimizer.parameter_groups[{index}].pattern = {shown}: must be a regular expression, but {error}"


RULES: tuple[Callable[[JobConfig], Problems], ...] = (
    check_sources,
    lambda job: iter(unsupported(job)),
    check_names,
    _schedule,
    _loaders,
    _profiling,
    _recompute,
    _async_tensor,
    _folders,
    _checkpoint,
    _bad_steps,
    _exit_after,
    _early_step,
    _groups,
)
"""Rules on the job alone."""

LAYOUT_RULES: tuple[Callable[[JobConfig, Degrees], Problems], ...] = (
    _batch,
    _streams,
    _sequence,
    _stores,
    _fake_rank,
    _pipeline,
    one_process_problems,
)
"""Rules on the job and its degrees, left out where the degrees do not fit the ranks."""
