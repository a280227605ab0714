"""A TOML file as a source of values with positions, and the chain of files that `extends` makes of it."""

import os
from dataclasses import dataclass

import tomli

from components.config.toml_lines import Path, key_lines
from components.runtime.errors import ConfigError

EXTENDS = "extends"
"""The one top-level key that is no section: a further file, relative to the one that names it, that this one builds
on."""


@dataclass(frozen=True)
class TomlFile:
    """What one file says, and where it says it."""

    name: str
    """Path as messages show it: as it was given, or for a base file seen from the same folder."""
    values: dict[str, object]
    """The parsed file, `extends` included."""
    lines: dict[Path, int]
    """Key path → line, from 1."""

    def line(self, path: Path) -> int:
        """Line of the key path, or of the nearest table around it that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def locate(self, path: Path) -> str:
        """`file.toml:12`."""
        return f"{self.name}:{self.line(path)}"


def read_toml(name: str) -> TomlFile:
    """Read one file. Raises ConfigError, with line and column for what is not TOML."""
    try:
        with open(name, "rb") as file:
            text = file.read().decode("utf-8-sig")  # some editors put a mark before the first line
        values = tomli.loads(text)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}; check the path and the current folder") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}:{error.colno}: not valid TOML: {error.msg}") from error
    return TomlFile(name, values, key_lines(text))


def read_chain(name: str) -> list[TomlFile]:
    """The file and everything it extends, the most basic file first.

    Raises ConfigError for a file that is missing or broken, and for a chain that comes back to itself.
    """
    files: list[TomlFile] = []
    seen: set[str] = set()
    following: str | None = name
    while following is not None:
        file = read_toml(following)
        files.append(file)
        seen.add(os.path.realpath(following))
        following = _base(file, seen)
    return files[::-1]


def _base(file: TomlFile, seen: set[str]) -> str | None:
    base = file.values.get(EXTENDS)
    if base is None:
        return None
    where = f"{file.locate((EXTENDS,))}: {EXTENDS} = {base!r}"
    if not isinstance(base, str):
        raise ConfigError(f"{where}: must be the path of one TOML file, relative to this one")
    path = os.path.normpath(os.path.join(os.path.dirname(file.name), base))
    if not os.path.isfile(path):
        raise ConfigError(f"{where}: no such file {path}; the path is relative to the file that names it")
    if os.path.realpath(path) in seen:
        raise ConfigError(
            f"{where}: goes round in a circle, {path} leads here; a base file cannot extend what builds on it"
        )
    return path
