"""From files and arguments to one frozen JobConfig: defaults < `extends` chain < the TOML < environment < command line.

Two passes over the arguments: the first only finds the file and the modules that add sections, the second reads all
arguments by the schema that these complete. Each value is checked by its own key's type here; what concerns several
keys is the business of `trainer.config.validate`, which goes on from a job that has faults, so that a user is told of
all problems at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from components.config.arguments import Argument, parse_arguments
from components.config.job_config import JobConfig
from components.config.overlay import Overlay, dotted
from components.config.schema import build, schema_of
from components.config.toml_file import TomlFile, read_chain
from components.config.values import NONE
from components.runtime.errors import ConfigError
from trainer.config.custom import config_class, named_modules
from trainer.config.titan import CONVERTER_ALIASES, RENAMED

CONFIG_FILE = ("job", "config_file")
ENVIRONMENT = {"CONFIG_FILE": CONFIG_FILE, "COMM_MODE": ("comm", "mode")}
"""Environment variables that stand for a key; `run_train.sh` is told by them, as in TorchTitan."""
SHORT = {"--print-config": "--job.print_config", "--print_config": "--job.print_config"}
"""Arguments that stand for a longer one."""


@dataclass(frozen=True)
class ResolvedJob:
    """A job, and where its values come from."""

    job: JobConfig
    """The configuration; an instance of a subclass where a module of the user's adds sections or keys."""
    provenance: dict[str, str]
    """Dotted key → "default", "file.toml:12" or the command-line argument. Every key is there."""
    notes: list[str]
    """What was accepted, but deserves a word. One line each."""
    problems: list[str] = field(default_factory=list)
    """What is wrong in the files and arguments, key by key. Such a job is for finding further problems, not to run."""
    refused: frozenset[str] = frozenset()
    """Dotted keys whose value was refused; `job` holds their defaults."""
    places: dict[str, str] = field(default_factory=dict)
    """Parts of the values of keys, as `data.sources[2].weight` → "file.toml:12", where a file sets them."""


def load_job(argv: Sequence[str], environ: Mapping[str, str]) -> ResolvedJob:
    """As `resolve`, but raises ConfigError with every problem of every file and argument."""
    resolved = resolve(argv, environ)
    if resolved.problems:
        raise ConfigError(*resolved.problems)
    return resolved


def resolve(argv: Sequence[str], environ: Mapping[str, str]) -> ResolvedJob:
    """Resolve a job. The TOML file is named by `--job.config_file` or else by CONFIG_FILE in `environ`; it may be
    absent. COMM_MODE in `environ` stands for `--comm.mode`.

    Unknown keys, wrong types and values out of range go into `problems`, and the keys keep their defaults. Raises
    ConfigError where there is nothing to go on from, since what follows would only be noise: a file that is missing or
    is no TOML, a module that cannot be imported, a key without a default and without a value.
    """
    argv = [SHORT.get(word, word) for word in argv]
    early = [*_from_environment(environ), *parse_arguments(argv, schema_of(JobConfig), RENAMED)]
    name = _config_file(early)
    files = read_chain(name) if name is not None else []
    config, notes = config_class(named_modules(files, early))
    overlay = Overlay(schema_of(config), RENAMED)
    for file in files:
        overlay.add_file(file)
        notes.extend(_idle_config_file(file))
    overlay.values.pop(CONFIG_FILE, None)
    overlay.add_arguments(_from_environment(environ))
    overlay.add_arguments(parse_arguments(argv, overlay.schema, RENAMED))
    overlay.finish()
    if any(key.required and path not in overlay.values for path, key in overlay.schema.keys.items()):
        raise ConfigError(*overlay.problems)
    provenance = {dotted(path): overlay.provenance[path] for path in overlay.schema.keys}
    job, alias_notes = _with_present_names(build(config, overlay.values), provenance)
    refused = frozenset(dotted(path) for path in overlay.refused)
    places = {name: where for parts in overlay.parts.values() for name, where in parts.items()}
    return ResolvedJob(job, provenance, notes + alias_notes, overlay.problems, refused, places)


def _from_environment(environ: Mapping[str, str]) -> list[Argument]:
    """CONFIG_FILE and COMM_MODE as arguments that stand before those of the command line. Empty means not set."""
    return [
        Argument(f"{variable}={environ[variable]}", path, environ[variable])
        for variable, path in ENVIRONMENT.items()
        if environ.get(variable)
    ]


def _config_file(arguments: Sequence[Argument]) -> str | None:
    """Path of the TOML file: what the last argument about it says."""
    names = [a.value for a in arguments if a.path == CONFIG_FILE and a.problem is None]
    return names[-1] if names and isinstance(names[-1], str) and names[-1] not in ("", *NONE) else None


def _idle_config_file(file: TomlFile) -> list[str]:
    if CONFIG_FILE not in file.lines:
        return []
    where = file.locate(CONFIG_FILE)
    return [f'{where}: job.config_file: has no effect inside a file; to build on another file write extends = "..."']


def _with_present_names(job: JobConfig, provenance: Mapping[str, str]) -> tuple[JobConfig, list[str]]:
    """The job with older names of converters replaced by present ones, and a note for each."""
    converters = [CONVERTER_ALIASES.get(name, name) for name in job.model.converters]
    where = provenance["model.converters"]
    notes = [
        f'{where}: model.converters: "{old}" is an older name of "{new}"'
        for old, new in zip(job.model.converters, converters, strict=True)
        if old != new
    ]
    return replace(job, model=replace(job.model, converters=converters)), notes
