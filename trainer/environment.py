"""Whole numbers from environment variables, with a message for what is none. Imports nothing of ours: see `guard`."""

from collections.abc import Mapping


def count(environ: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """The number that `name` is set to; `default` if it is unset or empty. Raises ConfigError below `least`."""
    from components.runtime.errors import ConfigError

    text = environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"{name}={text}: must be an integer of at least {least}")
    return int(text)
