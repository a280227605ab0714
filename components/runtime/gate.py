"""Gate: where the training thread may be stopped, so that another thread finds a consistent state on all ranks.

What is saved changes only inside of sections: the update of the weights, a save, a rollback. Between them a rank may
be for minutes where nothing can reach it (in a compiler, waiting for data, in a collective whose peer is late), and all
the while its state is that of the last section. Every rank goes through the same sections in the same order, so a
section's number names one state of the whole job.

Another thread closes the gate: no section is begun any more. The ranks may then be at different numbers, by one, since
some have begun what others have not. They agree on the largest, admit it everywhere, and wait until it is left. That
comes to an end: the rank that has begun it has all its communication before it behind it, so that none of the others
waits for a rank that is held back. Rejected: to look at a flag once a step. A step can take longer than a scheduler
waits.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Counts the sections of the training thread, and holds it back before the next one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = self._left = 0
        self._limit: int | None = None
        self._torn = self._ended = False

    @contextmanager
    def section(self) -> Iterator[None]:
        """Around everything that changes what is saved, on all ranks alike. Waits while the gate is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._limit is None or self._begun < self._limit)
            self._begun += 1
        try:
            yield
        except BaseException:
            self._torn = True
            raise
        finally:
            with self._changed:
                self._left += 1
                self._changed.notify_all()

    def end(self) -> None:
        """From the training thread: it begins no section any more, so nobody need wait for one."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self, agree: Callable[[int], int], seconds: float | None = None) -> bool:
        """From another thread: hold the training thread back, at the same section on all ranks: all is still then.

        `agree`: gives the largest number over all ranks for this rank's. False if the section was not left within
        `seconds` or will never be, or if one was left by an error, in the midst of a change; the gate stays closed
        then too.
        """
        with self._changed:
            self._limit = self._begun
        limit = agree(self._limit)
        with self._changed:
            self._limit = limit
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._left == limit or self._torn or self._ended, seconds)
            return self._left == limit and not self._torn

    def open(self) -> None:
        """Let the training thread go on."""
        with self._changed:
            self._limit = None
            self._changed.notify_all()
