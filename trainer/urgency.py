"""Which of several failing ranks is told of: the order of what a worker can leave behind. Imports nothing of ours."""

from enum import IntEnum


class Urgency(IntEnum):
    """The most urgent first."""

    SAID = 0
    """An error raised on purpose."""
    DEFECT = 1
    """Any other error, and death by a signal that nobody here sends."""
    COMMUNICATION = 2
    """A collective that did not end, mostly because another rank failed."""
    ENDED = 3
    """Killed, or ended by the launcher after another rank had failed."""
