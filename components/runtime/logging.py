"""Log messages: start-up facts, notes and warnings. They go to stderr; step lines are the console sink's, on stdout.

Plain lines without time or level: a reader wants the sentence, and `metrics.jsonl` has the times.
"""

import logging
import sys
from typing import TextIO

from components.runtime.errors import ConfigError
from components.runtime.world import World

logger = logging.getLogger("espalier")


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment: a progress bar puts its own there to stay in place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    def __init__(self, rank: int, name_rank: bool) -> None:
        super().__init__()
        self._rank, self._name_rank = f"[rank {rank}] ", name_rank

    def format(self, record: logging.LogRecord) -> str:
        serious = record.levelno >= logging.WARNING
        rank = self._rank if serious or self._name_rank else ""
        level = f"{record.levelname.lower()}: " if serious else ""
        return rank + level + super().format(record)


def configure(world: World, log_rank: str = "0") -> None:
    """Let the ranks of `log_rank` (LOG_RANK: a comma list) print messages, and every rank its warnings with its number.

    Until this is called nothing below a warning is printed. Raises ConfigError if `log_rank` is not a list of ranks.
    """
    ranks = _ranks(log_rank)
    if min(ranks) >= world.size:
        raise ConfigError(
            f"environment: LOG_RANK = {log_rank!r}: none of these is there; allowed: 0 to {world.size - 1}"
        )
    handler = _Handler()
    handler.setFormatter(_Formatter(world.rank, name_rank=len(ranks) > 1))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if world.rank in ranks else logging.WARNING)


def prints_messages() -> bool:
    """Whether this rank is one of LOG_RANK."""
    return logger.isEnabledFor(logging.INFO)


def _ranks(text: str) -> set[int]:
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdigit() for part in parts):
        return {int(part) for part in parts}
    raise ConfigError(f"environment: LOG_RANK = {text!r}: allowed: ranks separated by commas, such as 0 or 0,8")
