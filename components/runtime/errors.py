"""Typed errors, turned into prose only at the edge (`trainer.__main__`), and the exit codes that go with them."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of Espalier ends with."""

    DONE = 0
    FAILED = 1
    INPUT = 2
    STOPPED = 75
    """On a signal, with a checkpoint written: the same command goes on. EX_TEMPFAIL of sysexits.h."""


class EspalierError(Exception):
    """Root of all errors raised on purpose. The message says what, where, what is allowed, and how to mend it."""

    exit_code = ExitCode.FAILED


class UserError(EspalierError):
    """Something that the user gave is wrong; the program is not."""

    exit_code = ExitCode.INPUT


class ConfigError(UserError):
    """A configuration that cannot be run. Holds every problem that was found, not only the first."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(UserError):
    """Data that cannot be read; names file, line and column where there are any."""


class CheckpointError(EspalierError):
    """A checkpoint that is missing, broken, or belongs to another job."""

    exit_code = ExitCode.INPUT


class SaveError(CheckpointError):
    """A checkpoint that could not be written, so that work would be lost."""

    exit_code = ExitCode.FAILED


class NonFiniteError(EspalierError):
    """A loss or gradient that is not finite, found before the optimizer step."""


class SpikeError(EspalierError):
    """A loss or gradient that is far above those of the steps before, found before the optimizer step."""


class CommunicationError(EspalierError):
    """A collective that did not end: which one, over which ranks, and who did not come.

    `told`: a rank has printed that already.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class MeshError(UserError):
    """Degrees that do not fit the number of ranks or the model."""
