"""A resolved job as text: for reading (`--print-config`), and as TOML that loads back to the same job."""

from dataclasses import asdict, is_dataclass
from typing import Any

import tomli_w

from components.config.annotations import toml_literal
from components.config.job_config import JobConfig
from components.config.overlay import DEFAULT
from components.config.schema import Key, KeyPath, Schema, get, schema_of
from components.config.values import NONE
from trainer.config.inactive import inactive
from trainer.config.load import CONFIG_FILE, ResolvedJob

_VALUE_WIDTH = 48


def print_config(resolved: ResolvedJob) -> str:
    """Every key with its value, where that came from, and for keys that were set without effect why they have none.

    Reads like TOML; None is written as `none`.
    """
    schema = schema_of(type(resolved.job))
    blocks = [f"# {note}" for note in resolved.notes]
    for section in schema.sections:
        if keys := schema.section_keys(section):
            lines = [_line(resolved, key) for key in keys]
            blocks.append("\n".join([f"[{'.'.join(section)}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _line(resolved: ResolvedJob, key: Key) -> str:
    origin = resolved.provenance[key.name]
    why = None if origin == DEFAULT else inactive(resolved.job, key.name)
    pair = f"{key.path[-1]} = {toml_literal(get(resolved.job, key.path))}"
    return f"{pair:{_VALUE_WIDTH}}  # {origin}{f' (inactive: {why})' if why else ''}"


def to_toml(job: JobConfig) -> str:
    """The resolved job as TOML. Loaded again it gives an equal job, but for `job.config_file`, which is then its own
    path.

    A None that is also the default is left out, since TOML has none; any other None is written as the string "none".
    """
    schema = schema_of(type(job))
    return tomli_w.dumps(_table(job, (), schema))


def _table(job: JobConfig, section: KeyPath, schema: Schema) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key in schema.section_keys(section):
        value = get(job, key.path)
        if key.path != CONFIG_FILE and not (value is None and key.default is None):
            table[key.path[-1]] = NONE[0] if value is None else _plain(value)
    for path in schema.sections:
        if path[:-1] == section:
            table[path[-1]] = _table(job, path, schema)
    return table


def _plain(value: Any) -> Any:
    """Dataclasses as tables, all the way down."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {name: part for name, part in asdict(value).items() if part is not None}
    return value
