"""A tree of dataclasses read as a schema of TOML: nested dataclasses are sections, all other fields are keys.

Knows nothing of JobConfig: any frozen dataclass of dataclasses will do, which is how a user's own sections come in.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from components.config.annotations import hints_of, is_required
from components.config.nearest import did_you_mean

T = TypeVar("T")
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    path: KeyPath
    type: Any
    """Its annotation, bounds included."""
    field: dataclasses.Field[Any]

    @property
    def name(self) -> str:
        """The dotted name."""
        return ".".join(self.path)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return is_required(self.field)

    @property
    def default(self) -> Any:
        """The default; None for a required key."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return None if self.required else self.field.default


@dataclass(frozen=True)
class Schema:
    """All sections and keys below one dataclass, in the order of its fields."""

    root: Any
    sections: Mapping[KeyPath, Any]
    """Path → dataclass; a section that holds sections is listed before them."""
    keys: Mapping[KeyPath, Key]

    @cached_property
    def names(self) -> frozenset[str]:
        """Dotted names of all keys."""
        return frozenset(key.name for key in self.keys.values())

    def section_keys(self, section: KeyPath) -> list[Key]:
        """The keys that stand directly in that section."""
        return [key for path, key in self.keys.items() if path[:-1] == section]

    def hint(self, path: KeyPath, renamed: Mapping[str, str]) -> str:
        """`; did you mean X?` for a key or section that does not exist, or nothing.

        A known old name comes first, then a near name in the same section, then the same name in another, then any
        near one.
        """
        name, last = ".".join(path), path[-1]
        if name in renamed:
            return f"; did you mean {renamed[name]}?"
        siblings = {key.name for key in self.section_keys(path[:-1])}
        if near := did_you_mean(name, siblings):
            return near
        elsewhere = sorted(known for known in self.names if known.split(".")[-1] == last)
        if elsewhere:
            return f"; did you mean {elsewhere[0]}?"
        return did_you_mean(name, [*(".".join(section) for section in self.sections), *self.names])


def schema_of(root: Any) -> Schema:
    """The schema of a dataclass."""
    sections: dict[KeyPath, Any] = {}
    keys: dict[KeyPath, Key] = {}

    def visit(table: Any, path: KeyPath) -> None:
        for field in dataclasses.fields(table):
            inner = hints_of(table)[field.name]
            here = (*path, field.name)
            if dataclasses.is_dataclass(inner):
                sections[here] = inner
                visit(inner, here)
            else:
                keys[here] = Key(here, inner, field)

    visit(root, ())
    return Schema(root, sections, keys)


def build(root: type[T], values: Mapping[KeyPath, object]) -> T:
    """An instance of the dataclass: `values` where they are given, defaults elsewhere. The values must have been
    checked."""

    def instance(table: Any, path: KeyPath) -> Any:
        given: dict[str, Any] = {}
        for field in dataclasses.fields(table):
            inner, here = hints_of(table)[field.name], (*path, field.name)
            if dataclasses.is_dataclass(inner):
                given[field.name] = instance(inner, here)
            elif here in values:
                given[field.name] = values[here]
        return table(**given)

    return instance(root, ())


def get(config: object, path: KeyPath) -> Any:
    """The value of a key in an instance."""
    for name in path:
        config = getattr(config, name)
    return config


def merged(base: Any, extra: Any) -> Any:
    """The dataclass `base` with the sections and keys of `extra` laid over it, below all sections that both have.

    A key that both have takes type and default from `extra`. The result is a subclass of `base`.
    """
    hints, known = hints_of(extra), hints_of(base)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(extra):
        kind, old = hints[field.name], known.get(field.name)
        if dataclasses.is_dataclass(kind) and dataclasses.is_dataclass(old):
            kind = merged(old, kind)
        fields.append((field.name, kind, _fresh_field(field, kind)))
    # Keyword-only, so that a key with a default may be followed by one without.
    return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True, kw_only=True)


def _fresh_field(field: dataclasses.Field[Any], kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return dataclasses.field(default_factory=kind)
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field() if field.default is dataclasses.MISSING else dataclasses.field(default=field.default)
