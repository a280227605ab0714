"""SIGINT and SIGTERM ask a job to stop between two chunks; a second one ends it at once, which loses no more."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopper:
    """Knows whether a signal has come."""

    number: int | None = None
    """Of the signal that came."""

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.number is not None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.number = number
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stoppable() -> Iterator[Stopper]:
    """Listen to the signals, in the main thread."""
    stopper = Stopper()
    before = {x: signal.signal(x, stopper.hear) for x in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
