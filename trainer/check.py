"""`python -m trainer check`: every problem of a job in about a second, without torch, a network or an accelerator.

What only running the user's own code can tell is not guessed: `experimental.custom_import` is not imported, and the
answer says what was therefore not checked. `job.custom_config_module` is imported: without it no key can be judged.
"""

import re
from collections.abc import Mapping

from components.config.annotations import toml_literal
from components.mesh.degrees import resolve_degrees
from components.runtime.errors import ConfigError
from models.train_spec import ModelArgs
from trainer.config.help import help_text
from trainer.config.load import ResolvedJob, resolve
from trainer.config.output import print_config
from trainer.config.validate import require_valid


def run_check(argv: list[str], environ: Mapping[str, str]) -> int:
    """Print a summary of the job, or all its problems to stderr. Returns the exit code, 0 or 2.

    Besides `--section.key=value` it takes the TOML file as a word of its own, before the keys, and `--world-size=N`;
    without that the world is NGPU × NNODES of `environ`, else 1.
    """
    from trainer.command import report_errors

    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    return report_errors(lambda: _check(argv, environ))


def _check(argv: list[str], environ: Mapping[str, str]) -> int:
    arguments, size = _own_arguments(argv)
    world_size = world_of(environ) if size is None else size
    resolved = resolve(arguments, environ)
    if resolved.job.job.print_config and not resolved.problems:
        print(print_config(resolved))
    args = require_valid(resolved, world_size)
    print("\n".join(_summary(resolved, args, world_size)))
    return 0


def _own_arguments(argv: list[str]) -> tuple[list[str], int | None]:
    """The arguments that are the job's, the file's path among them, and the world size where it is given."""
    rest, size = list(argv), None
    arguments: list[str] = []
    while rest:
        word = rest.pop(0)
        if match := re.fullmatch(r"--world[-_]size(?:=(.*))?", word):
            text = match[1] if match[1] is not None else (rest.pop(0) if rest else "")
            size = _positive(f"--world-size={text}", text)
        elif not arguments and not word.startswith("-"):
            arguments.append(f"--job.config_file={word}")
        else:
            arguments.append(word)
    return arguments, size


def world_of(environ: Mapping[str, str]) -> int:
    """The ranks that NGPU and NNODES say. Raises ConfigError."""
    return _count("NGPU", environ) * _count("NNODES", environ)


def _count(variable: str, environ: Mapping[str, str]) -> int:
    text = environ.get(variable) or "1"
    return _positive(f"{variable}={text}", text)


def _positive(shown: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{shown}: must be an integer of at least 1")
    return int(text)


def _summary(resolved: ResolvedJob, args: ModelArgs | None, world_size: int) -> list[str]:
    job = resolved.job
    degrees = resolve_degrees(job.parallelism, world_size)
    local = job.training.local_batch_size * degrees.batch
    rows = local if job.training.global_batch_size == -1 else job.training.global_batch_size
    size = (
        f"{args.parameter_count():,} parameters" if args is not None else "not checked: it is registered by other code"
    )
    lines = [
        f"job              {job.job.description}",
        f"model            {job.model.name} {job.model.flavor}, {size}",
        f"layout           {_ranks(world_size)}: {degrees}",
        f"global batch     {rows:,} rows: {job.training.local_batch_size} local × {degrees.batch} data-parallel"
        f" × {rows // local} accumulated",
        f"tokens per step  {rows * job.training.seq_len:,}",
        f"steps            {job.training.steps:,}: {rows * job.training.seq_len * job.training.steps:,} tokens",
    ]
    lines.extend(f"note             {note}" for note in [*resolved.notes, *_unchecked(resolved)])
    return lines


def _unchecked(resolved: ResolvedJob) -> list[str]:
    module = resolved.job.experimental.custom_import
    if not module:
        return []
    return [f"experimental.custom_import = {toml_literal(module)}: names from {module} are checked when it is imported"]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
