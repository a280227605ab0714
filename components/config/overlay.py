"""Layers of sources over the defaults of a schema: later ones win, and every problem of every layer is found at
once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from components.config.annotations import describe
from components.config.arguments import Argument
from components.config.schema import KeyPath, Schema
from components.config.toml_file import EXTENDS, TomlFile
from components.config.toml_lines import Path
from components.config.values import Fault, check

DEFAULT = "default"
"""Provenance of a key that no source sets."""


@dataclass
class Overlay:
    """Values and where they come from, filled source by source."""

    schema: Schema
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Old names of keys and sections, for hints."""
    values: dict[KeyPath, object] = field(default_factory=dict)
    provenance: dict[KeyPath, str] = field(default_factory=dict)
    parts: dict[KeyPath, dict[str, str]] = field(default_factory=dict)
    """Key of a list → what stands in it, by dotted names such as `a.b[0].c`, and where; of files only, since an
    argument is short."""
    problems: list[str] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)
    """Keys whose last value is none of theirs; `values` lacks them, so that they stay at their defaults."""

    def add_file(self, file: TomlFile) -> None:
        """Lay a file over what is there. Its problems are listed in the order of its lines."""
        faults: list[Fault] = []
        top = {name: value for name, value in file.values.items() if name != EXTENDS}
        self._add_table(file, (), top, faults)
        faults.sort(key=lambda fault: file.line(fault.path))
        self.problems.extend(f"{file.locate(fault.path)}: {_sentence(fault)}" for fault in faults)

    def add_arguments(self, arguments: Iterable[Argument]) -> None:
        """Lay command-line arguments over what is there, the last of several for one key winning."""
        for argument in arguments:
            if argument.problem is not None:
                self.problems.append(f"{argument.text}: {argument.problem}")
                if argument.path in self.schema.keys:
                    self._refuse(argument.path)
                continue
            faults: list[Fault] = []
            self._set(argument.path, argument.value, argument.locate, faults)
            for fault in faults:  # a fault of the whole value need not repeat what the argument says
                tail = fault.text if fault.path == argument.path else _sentence(fault)
                self.problems.append(f"{argument.text}: {tail}")

    def finish(self) -> None:
        """Find required keys that no source has set, and give every other key its provenance."""
        for path, key in self.schema.keys.items():
            if path not in self.provenance and key.required:
                self.problems.append(f"{key.name}: is missing: must be {describe(key.type)}")
            self.provenance.setdefault(path, DEFAULT)

    def _add_table(self, file: TomlFile, path: KeyPath, table: Mapping[str, object], faults: list[Fault]) -> None:
        for name, value in table.items():
            here = (*path, name)
            if here in self.schema.keys:
                self._set(here, value, file.locate, faults)
                if isinstance(value, list):
                    inside = (x for x in file.lines if x[: len(here)] == here and x != here)
                    self.parts[here] = {dotted(x): file.locate(x) for x in inside}
            elif here not in self.schema.sections:
                kind = "section" if isinstance(value, Mapping) else "key"
                faults.append(Fault(here, f"unknown {kind}{self.schema.hint(here, self.renamed)}"))
            elif isinstance(value, Mapping):
                self._add_table(file, here, value, faults)
            else:
                faults.append(Fault(here, f"is a section; write [{dotted(here)}] and its keys below"))

    def _set(self, path: KeyPath, value: object, locate: Callable[[Path], str], faults: list[Fault]) -> None:
        before = len(faults)
        checked = check(self.schema.keys[path].type, value, path, faults)
        self.provenance[path] = locate(path)
        self.parts.pop(path, None)
        if len(faults) > before:
            self._refuse(path)
            return
        self.values[path] = checked
        self.refused.discard(path)

    def _refuse(self, path: KeyPath) -> None:
        self.values.pop(path, None)
        self.refused.add(path)


def dotted(path: Path) -> str:
    """`a.b[0].c`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _sentence(fault: Fault) -> str:
    shown = "" if fault.shown is None else f" = {_short(fault.shown)}"
    return f"{dotted(fault.path)}{shown}: {fault.text}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
