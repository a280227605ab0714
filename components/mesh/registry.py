"""Registry: everything that a TOML can name is a registered name. Torch-free; frozen after start-up."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from components.runtime.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for.

    `kind` is the noun that messages use ("optimizer"), `key` the key that names an entry ("optimizer.name").
    """

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key
        self._entries: dict[str, T] = {}
        self._frozen = False

    def register(self, name: str, value: T) -> T:
        """Add an entry. Raises ConfigError if the name is taken, or if start-up is over."""
        if self._frozen:
            raise ConfigError(
                f"{self.kind} {name!r} is registered after start-up: register it in `experimental.custom_import`"
            )
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered twice: choose another name")
        self._entries[name] = value
        return value

    def decorator(self, name: str) -> Callable[[T], T]:
        """Like `register`, for use as `@registry.decorator("name")`."""
        return lambda value: self.register(name, value)

    def freeze(self) -> None:
        """Refuse further entries."""
        self._frozen = True

    def lookup(self, name: str) -> T:
        """The entry of that name. Raises ConfigError that lists the names and the nearest one."""
        if name in self._entries:
            return self._entries[name]
        raise ConfigError(f"{self.key} = {name!r}: no such {self.kind}; {self.allowed(name)}")

    def allowed(self, name: str) -> str:
        """What may stand there instead of `name`, as the tail of a message."""
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"allowed: {', '.join(sorted(self._entries)) or 'none'}{hint}"

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
