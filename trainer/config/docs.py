"""The generated documents: `docs/config.md` for people, `docs/config.schema.json` for editors of TOML.

Both come from the dataclasses and the docstrings under their fields, so that neither can say anything else than the
code. `scripts/generate_docs.py` writes them.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from components.config.annotations import describe, toml_literal
from components.config.field_docs import field_docs, section_doc
from components.config.job_config import JobConfig
from components.config.schema import Key, Schema, schema_of
from components.config.toml_file import EXTENDS
from trainer.config.support import UNSUPPORTED
from trainer.config.titan import DIFFERENT_DEFAULTS, OUR_KEYS, OUR_SECTIONS

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/generate_docs.py from the docstrings in components/config. Change those, and run it. -->

One TOML file describes a job. Every section and key below may stand in it, and on the command line as
`--section.key=value`. Later wins: defaults, the files of `extends`, the file, the command line. The TOML files of
TorchTitan v0.2.2 load unchanged; where a default differs from that release, the key says so, and keys that it does not
have are marked *new*.

- `extends = "other.toml"`, above all sections, builds on another file, whose path is relative to the file that says so.
- TOML has no null: for a key that may be none, write `"none"` where its default is something else.
- `python -m trainer check FILE` finds every problem without starting; `--print-config` shows every value, where it
  came from, and which of those that were set do nothing.
- `config.schema.json` beside this page lets an editor complete and check keys: put
  `#:schema docs/config.schema.json` into the first line of a TOML file.
"""

EXTENDS_DOC = (
    "Path of a TOML file that this one builds on, relative to this one; its values are laid below this file's."
)


def config_page() -> str:
    """The text of `docs/config.md`."""
    schema = schema_of(JobConfig)
    parts = [INTRODUCTION]
    for section, table in schema.sections.items():
        if keys := schema.section_keys(section):
            name = ".".join(section)
            new = " *(new)*" if section[0] in OUR_SECTIONS else ""
            entries = [_entry(key, field_docs(table)[key.path[-1]]) for key in keys]
            parts.append("\n".join([f"## `[{name}]`{new}", "", section_doc(table), "", *entries, ""]))
    return "\n".join([*parts, _unsupported()])


def _entry(key: Key, doc: str) -> str:
    notes = " *(new)*" if key.name in OUR_KEYS else ""
    if key.name in DIFFERENT_DEFAULTS:
        notes = f" (TorchTitan v0.2.2: `{toml_literal(DIFFERENT_DEFAULTS[key.name])}`)"
    return f"- **`{key.path[-1]}`** — {describe(key.type)}; default `{toml_literal(key.default)}`{notes}  \n  {doc}"


def _unsupported() -> str:
    rows = [f"| `{entry.key}` | {entry.why} |" for entry in UNSUPPORTED]
    head = "Refused only where they would do something; a file that merely mentions them loads."
    return "\n".join(["## Not yet supported", "", head, "", "| key | why, and what to do |", "|---|---|", *rows, ""])


def json_schema() -> str:
    """The text of `docs/config.schema.json`."""
    schema = TypeAdapter(JobConfig).json_schema()
    tables = {table.__name__: table for table in _tables(schema_of(JobConfig))}
    for name, definition in schema["$defs"].items():
        _describe(definition, tables[name])
    _describe(schema, JobConfig)
    schema["properties"] = {EXTENDS: {"type": "string", "description": EXTENDS_DOC}, **schema["properties"]}
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Espalier job",
        "definitions": schema.pop("$defs"),
    }
    text = json.dumps(head | schema | {"title": "Espalier job"}, indent=2, ensure_ascii=False)
    return text.replace("#/$defs/", "#/definitions/") + "\n"


def _tables(schema: Schema) -> list[Any]:
    """Every dataclass that a TOML can hold: the sections, and the tables in lists."""
    items = [arg for key in schema.keys.values() for arg in getattr(key.type, "__args__", ())]
    return [*schema.sections.values(), *(item for item in items if hasattr(item, "__dataclass_fields__"))]


def _describe(definition: dict[str, Any], table: Any) -> None:
    """Add descriptions, and refuse keys that do not exist."""
    definition["description"] = section_doc(table)
    definition["additionalProperties"] = False
    for name, entry in definition["properties"].items():
        entry["description"] = field_docs(table)[name]
        entry.pop("title", None)
        _without_null(entry)


def _without_null(entry: dict[str, Any]) -> None:
    """TOML has no null: where None is allowed, the word for it is."""
    if {"type": "null"} in entry.get("anyOf", []):
        entry["anyOf"] = [part if part != {"type": "null"} else {"const": "none"} for part in entry["anyOf"]]
        if entry.get("default", 0) is None:
            del entry["default"]
