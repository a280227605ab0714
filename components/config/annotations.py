"""The types of keys: taken apart, and put into words for messages, `--help` and the docs.

A bound is part of a type (`Annotated[int, Field(ge=1)]`), so the words are made here from what pydantic checks by.
"""

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def describe(annotation: Any) -> str:
    """What a value of that type is, as the end of "must be …"."""
    if get_origin(annotation) is Annotated:
        base, *extras = get_args(annotation)
        return _finite(describe(base), extras) + _bounds(extras)
    if get_origin(annotation) in (Union, types.UnionType):
        # Optional first, so that "none" is said last.
        named = [describe(member) for member in members(annotation)]
        return " or ".join([*named, "none"] if is_optional(annotation) else named)
    if get_origin(annotation) is Literal:
        values = [toml_literal(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(annotation) is list:
        return f"a list of {_plural(get_args(annotation)[0])}"
    if dataclasses.is_dataclass(annotation):
        return f"a table with {', '.join(hints_of(annotation))}"
    names: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    if annotation in names:
        return names[annotation]
    return f"a value of type {annotation.__name__ if isinstance(annotation, type) else annotation}"


def _plural(item: Any) -> str:
    if get_origin(item) is list:
        return f"lists of {_plural(get_args(item)[0])}"
    if get_origin(item) is Literal:
        return f"values out of {', '.join(toml_literal(value) for value in get_args(item))}"
    if dataclasses.is_dataclass(item):
        return f"tables with {', '.join(hints_of(item))}"
    names: dict[Any, str] = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}
    return names.get(item) or f"values that are each {describe(item)}"


def _constraints(extras: list[Any]) -> list[Any]:
    return [constraint for extra in extras for constraint in getattr(extra, "metadata", [extra])]


def _finite(number: str, extras: list[Any]) -> str:
    infinite = all(getattr(constraint, "allow_inf_nan", True) for constraint in _constraints(extras))
    return number if infinite else number.replace("a number", "a finite number")


def _bounds(extras: list[Any]) -> str:
    limits: dict[str, Any] = {}
    for constraint in _constraints(extras):
        limits.update({n: getattr(constraint, n) for n in ("ge", "gt", "le", "lt") if hasattr(constraint, n)})
        if hasattr(constraint, "min_length"):
            return f" of at least {constraint.min_length} character{'s' if constraint.min_length > 1 else ''}"
    low, high = limits.get("ge"), limits.get("le")
    if low is not None and high is not None:
        return f" from {_exact(low)} to {_exact(high)}"
    words = {"ge": "of at least", "gt": "greater than", "le": "of at most", "lt": "less than"}
    return "".join(f"{' and' if n else ''} {words[k]} {_exact(v)}" for n, (k, v) in enumerate(limits.items()))


def _exact(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def toml_literal(value: object) -> str:
    """The value on one line, in TOML's notation; `none`, for which TOML has no notation, for None."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key_literal(name)} = {toml_literal(part)}" for name, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_literal(part) for part in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return toml_literal({k: v for k, v in dataclasses.asdict(value).items() if v is not None})
    return str(value)


def _key_literal(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else toml_literal(name)


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without None; any other type is its own only one."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) if part is not types.NoneType for member in members(part)]
    return [annotation]


def is_optional(annotation: Any) -> bool:
    """Whether None is allowed."""
    return get_origin(annotation) in (Union, types.UnionType) and types.NoneType in get_args(annotation)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def hints_of(table: Any) -> dict[str, Any]:
    """Field → type of a dataclass, in the order of the fields, annotations resolved and their bounds kept."""
    hints = get_type_hints(table, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(table)}


def strip(annotation: Any) -> Any:
    """The type without its bounds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def single(annotation: Any) -> Any:
    """The type without bounds and None, where it has one alternative beside None; else as it is."""
    parts = members(annotation)
    return strip(parts[0]) if len(parts) == 1 else annotation
