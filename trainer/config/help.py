"""The text of `python -m trainer --help`: the commands, and every key with its type, default and meaning."""

import sys
import textwrap

from components.config.annotations import describe, toml_literal
from components.config.field_docs import field_docs, section_doc
from components.config.job_config import JobConfig
from components.config.schema import Key, Schema, schema_of

USAGE = """\
Espalier trains the model that one TOML file describes.

  python -m trainer [--job.config_file=FILE] [--section.key=value ...]         train
  python -m trainer check [FILE] [--world-size=N] [--section.key=value ...]    find every problem, without starting
  python -m trainer --print-config [...]                                       train, and first print every value
  python -m trainer --help                                                     this text

`./run_train.sh` does the same on every device of the machine: CONFIG_FILE names the file, NGPU the number of processes,
COMM_MODE=fake_backend asks for the dry run.

Later wins: defaults, the files of `extends = "other.toml"`, the file, the command line.
A key on the command line: --training.steps=10 or --training.steps 10; --compile.enable, --compile.no_enable or
--compile.enable=false; lists with commas or in brackets; none for a key that may be none. - and _ are the same.
"""

WIDEST = 160
"""Columns up to which a key and its default stay on one line, to copy from."""


def help_text() -> str:
    """The whole text: bold headings on a terminal, plain on a pipe."""
    bold = sys.stdout.isatty()
    schema = schema_of(JobConfig)
    parts = [USAGE]
    for section, table in schema.sections.items():
        if keys := schema.section_keys(section):
            title = f"[{'.'.join(section)}]"
            heading = f"\033[1m{title}\033[0m" if bold else title
            parts.append("\n".join([f"{heading}  {section_doc(table)}", *_entries(schema, table, keys)]))
    return "\n".join(parts)


def _entries(schema: Schema, table: type, keys: list[Key]) -> list[str]:
    docs = field_docs(table)
    lines: list[str] = []
    for key in keys:
        head = f"  --{key.name}={toml_literal(key.default)}  ({describe(key.type)})"
        lines.extend([head] if len(head) <= WIDEST else textwrap.wrap(head, 116, subsequent_indent="    "))
        lines.extend(textwrap.wrap(docs[key.path[-1]], 116, initial_indent="      ", subsequent_indent="      "))
    return lines
