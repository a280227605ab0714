"""Command-line arguments of the form `--section.key=value`, read by a schema.

Written by hand rather than with argparse or tyro: keys number two hundred, all problems must be found at once, and a
parser that is built per key would cost more start-up time than all the rest. `-` and `_` are the same in a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.config.annotations import describe, members
from components.config.schema import Key, KeyPath, Schema
from components.config.toml_lines import Path
from components.config.values import parse_text


@dataclass(frozen=True)
class Argument:
    """One argument: a value for a key, or what is wrong with it."""

    text: str
    """As it was given, `--key value` written with an equals sign."""
    path: KeyPath = ()
    value: object = None
    problem: str | None = None

    def locate(self, path: Path) -> str:
        """The argument itself: it has no finer positions."""
        return self.text


def parse_arguments(argv: Sequence[str], schema: Schema, renamed: Mapping[str, str]) -> list[Argument]:
    """All arguments in order. Never raises: an argument that cannot be read carries its problem.

    `renamed` maps old names of keys to present ones, for hints.
    """
    arguments: list[Argument] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            arguments.append(Argument(word, problem="not understood: every argument is --section.key=value"))
            continue
        name, equals, text = word.partition("=")
        key, flag = _find(name[2:], schema)
        value = text if equals else _next_value(rest, key)
        arguments.append(_argument(name, value, key, flag, schema, renamed))
    return arguments


def _path(name: str) -> KeyPath:
    return tuple(name.replace("-", "_").split("."))


def _find(name: str, schema: Schema) -> tuple[Key | None, bool]:
    """The key, and false where the name says `no_key`."""
    path = _path(name)
    if path in schema.keys:
        return schema.keys[path], True
    positive = (*path[:-1], path[-1].removeprefix("no_"))
    key = schema.keys.get(positive)
    return (key, False) if key is not None and _is_flag(key) else (None, True)


def _is_flag(key: Key) -> bool:
    return members(key.type) == [bool]


def _next_value(rest: list[str], key: Key | None) -> str | None:
    """The value of `--key value`; a boolean takes the next word only if it is one."""
    if not rest or rest[0].startswith("--"):
        return None
    if key is not None and _is_flag(key) and rest[0].lower() not in ("true", "false"):
        return None
    return rest.pop(0)


def _argument(
    name: str, value: str | None, key: Key | None, flag: bool, schema: Schema, renamed: Mapping[str, str]
) -> Argument:
    text = name if value is None else f"{name}={value}"
    path = _path(name[2:])
    if key is None:
        return Argument(text, path, problem=_unknown(path, schema, renamed))
    if not flag:
        problem = None if value is None else f"takes no value; write --{key.name}={value}"
        return Argument(text, key.path, False, problem)
    if value is None:
        problem = None if _is_flag(key) else f"a value is missing: must be {describe(key.type)}"
        return Argument(text, key.path, True, problem)
    return Argument(text, key.path, parse_text(key.type, value))


def _unknown(path: KeyPath, schema: Schema, renamed: Mapping[str, str]) -> str:
    if path in schema.sections:
        return f"{'.'.join(path)} is a section; write --{'.'.join(path)}.key=value"
    return f"unknown key{schema.hint(path, renamed)}"
