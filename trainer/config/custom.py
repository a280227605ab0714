"""Sections and keys of a user's own: the `JobConfig` dataclass of a module named in the configuration.

The module is imported, so its code runs; that is the price of configuration in Python, paid only by whoever asks for
it. Names of TorchTitan's own modules stand for the built-in sections: nothing is imported for them.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from components.config.arguments import Argument
from components.config.job_config import JobConfig
from components.config.schema import merged, schema_of
from components.config.toml_file import TomlFile
from components.runtime.errors import ConfigError

MODULE_KEYS = (("job", "custom_config_module"), ("experimental", "custom_args_module"))
"""The keys that may name such a module; the second is TorchTitan's alias of the first."""


def named_modules(files: Sequence[TomlFile], arguments: Sequence[Argument]) -> dict[str, tuple[str, str]]:
    """Modules that the sources name → (the key that names it, where). Values that are no strings are left to the
    check."""
    found: dict[str, tuple[str, str]] = {}
    for section, key in MODULE_KEYS:
        name, where = "", ""
        for file in files:
            table = file.values.get(section)
            value = table.get(key, name) if isinstance(table, Mapping) else name
            if isinstance(value, str) and value != name:
                name, where = value, file.locate((section, key))
        for argument in arguments:
            if argument.path == (section, key) and isinstance(argument.value, str):
                name, where = argument.value, argument.text
        if name:
            found[name] = (f"{section}.{key}", where)
    return found


def config_class(modules: Mapping[str, tuple[str, str]]) -> tuple[type[JobConfig], list[str]]:
    """JobConfig with the sections of the named modules laid over it, and notes on what was imported.

    Raises ConfigError when a module cannot be imported or has no usable JobConfig.
    """
    config: type[JobConfig] = JobConfig
    notes: list[str] = []
    for module, (key, where) in modules.items():
        if module == "torchtitan" or module.startswith("torchtitan."):
            notes.append(f"{where}: {key} = {module!r}: the built-in sections stand for it; nothing was imported")
            continue
        config = merged(config, _imported(module, f"{where}: {key} = {module!r}"))
        notes.append(f"{where}: {key} = {module!r}: imported, its sections and keys are added")
    return config, notes


def _imported(module: str, where: str) -> Any:
    """The module's JobConfig, a dataclass whose annotations resolve."""
    try:
        custom = getattr(importlib.import_module(module), "JobConfig", None)
    except Exception as error:  # the user's code runs here: whatever it raises is told, not thrown at them
        raise ConfigError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(custom, type) and dataclasses.is_dataclass(custom)):
        raise ConfigError(f"{where}: has no dataclass JobConfig; its fields are the sections to add or to change")
    try:
        for key in schema_of(custom).keys.values():
            TypeAdapter(key.type)
    except (NameError, TypeError, PydanticUserError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: a type in its JobConfig cannot be checked: {reason}") from error
    return custom
