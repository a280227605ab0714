"""World: which of how many processes this one is. From torchrun's variables, so that one process needs no torchrun."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.runtime.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all processes of the job. Torch-free."""

    rank: int
    """Number of this process, from 0."""
    local_rank: int
    """Its number on this machine, from 0: the index of its device."""
    size: int
    """Number of processes."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "World":
        """Read RANK, LOCAL_RANK and WORLD_SIZE; 0, 0 and 1 where they are not set.

        Raises ConfigError, with every problem, where one is no whole number or out of range.
        """
        problems: list[str] = []
        size = _number(environ, "WORLD_SIZE", 1, 1, problems)
        rank = _number(environ, "RANK", 0, 0, problems)
        local_rank = _number(environ, "LOCAL_RANK", 0, 0, problems)
        if not problems and rank >= size:
            problems.append(f"environment: RANK = {rank} with WORLD_SIZE = {size}: allowed: 0 to {size - 1}")
        if not problems and local_rank > rank:
            problems.append(f"environment: LOCAL_RANK = {local_rank} with RANK = {rank}: allowed: 0 to {rank}")
        if problems:
            raise ConfigError(
                *(f"{problem}; torchrun sets these variables, or unset all of them" for problem in problems)
            )
        return cls(rank, local_rank, size)


def _number(environ: Mapping[str, str], name: str, default: int, least: int, problems: list[str]) -> int:
    text = environ.get(name, str(default))
    if text.isascii() and text.isdigit() and int(text) >= least:
        return int(text)
    problems.append(f"environment: {name} = {text!r}: allowed: a whole number from {least} on")
    return default
