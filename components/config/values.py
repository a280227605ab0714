"""Values of keys: is a value of the key's type, how is it written on the command line, and how is the type called.

pydantic judges each value by the annotation of its key, strictly: a string is no number, a number no boolean, and
only an integer may stand for a float. We word the messages ourselves, since a type states its bounds better than a
validator does, and go into dataclasses ourselves, since pydantic's dataclass schema ignores unknown keys.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

import tomli
from pydantic import TypeAdapter, ValidationError

from components.config.annotations import (
    describe,
    hints_of,
    is_optional,
    is_required,
    members,
    single,
    strip,
    toml_literal,
)
from components.config.nearest import did_you_mean
from components.config.toml_lines import Path

NONE = ("none", "None")
"""How the absence of a value is written for an optional key, on the command line and in TOML, which has no null."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a value, or with a part of it."""

    path: Path
    """The key, or the part of its value, that is wrong."""
    text: str
    """What is wrong, without the key and without the value."""
    shown: str | None = None
    """The value in TOML's notation; None where the key itself is wrong."""


def check(annotation: Any, value: object, path: Path, faults: list[Fault]) -> Any:
    """`value` as the type wants it (an int becomes a float where a float is expected); what is wrong goes into
    `faults`."""
    if is_optional(annotation) and value in NONE:
        return None
    inner = single(annotation)
    if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
        return _check_table(inner, value, path, faults)
    if get_origin(inner) is list and isinstance(value, list):
        item = get_args(inner)[0]
        if dataclasses.is_dataclass(item) or get_origin(item) is list:
            return [check(item, part, (*path, index), faults) for index, part in enumerate(value)]
    try:
        return _adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return _check_json(annotation, value, path, faults)


def _check_json(annotation: Any, value: object, path: Path, faults: list[Fault]) -> Any:
    """A second look by the rules of JSON: equally strict, but a list may be a tuple there and a string a path or an
    enum."""
    try:
        return _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):  # TypeError: a date, which JSON has not
        faults.append(Fault(path, f"must be {describe(annotation)}", toml_literal(value)))
        return value


def _check_table(table: Any, value: Mapping[str, object], path: Path, faults: list[Fault]) -> Any:
    hints = hints_of(table)
    before = len(faults)
    given: dict[str, Any] = {}
    for name, part in value.items():
        if name in hints:
            given[name] = check(hints[name], part, (*path, name), faults)
        else:
            faults.append(Fault((*path, name), f"unknown key{did_you_mean(name, hints)}"))
    missing = [f.name for f in dataclasses.fields(table) if is_required(f) and f.name not in given]
    faults.extend(Fault(path, f"key {name!r} is missing: must be {describe(hints[name])}") for name in missing)
    return table(**given) if len(faults) == before else None


def parse_text(annotation: Any, text: str) -> Any:
    """What a command-line string stands for in a key of that type.

    The first alternative that it fits, else the nearest that it can be read as, for `check` to find fault with.
    """
    best: Any = text
    for member in members(annotation):
        value = _parse_member(member, text)
        faults: list[Fault] = []
        check(member, value, (), faults)
        if not faults:
            return value
        best = value if best is text else best
    return best


def _parse_member(member: Any, text: str) -> Any:
    plain = strip(member)
    if get_origin(plain) is Literal:
        return next((value for value in get_args(plain) if str(value) == text), text)
    if plain is str:
        return text
    if plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if plain is int or plain is float:
        return _number(plain, text)
    if text[:1] in ("[", "{"):
        return _literal(text)
    if get_origin(plain) in (list, tuple) and _is_scalar(get_args(plain)[0]):
        return [parse_text(get_args(plain)[0], part.strip()) for part in text.split(",")] if text.strip() else []
    return text


def _is_scalar(annotation: Any) -> bool:
    inner = single(annotation)
    return get_origin(inner) is not list and not dataclasses.is_dataclass(inner)


def _number(kind: type[int] | type[float], text: str) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        return text


def _literal(text: str) -> object:
    """A list or table in TOML's notation, else in JSON's."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        pass  # not TOML; JSON comes next, and what is neither stays a string, which the check then refuses
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)
