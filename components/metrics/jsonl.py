"""`metrics.jsonl`: the record that every run keeps, one JSON object a line, flushed as it is written.

On resume, and when a job goes back to a checkpoint, the steps that will be run again are dropped, so that every step
stands there once. The file is written anew beside the old one and renamed over it: a kill in between loses nothing. A
new run in an old folder moves the old file aside (`metrics.1.jsonl`, …) instead of writing behind it. What finds no
room on the disk waits in memory.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from components.metrics.step import StepMetrics, to_json
from components.runtime.errors import UserError
from components.runtime.logging import logger


class JsonlSink:
    """Appends to a file. `resume_step` is the step that the run resumed from; None for a new run.

    Raises UserError if the file cannot be written.
    """

    def __init__(self, path: Path | str, resume_step: int | None) -> None:
        path = Path(path)
        try:
            if resume_step is None:
                _move_aside(path)
            else:
                _drop_later(path, resume_step)
            self._path, self._file = path, path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path}: cannot write metrics there: {error.strerror}; move it away, or choose another job.dump_folder"
            ) from error
        self._waiting = b""
        self._told = False
        if resume_step is not None:
            self.note({"event": "resume", "step": resume_step})

    def log(self, metrics: StepMetrics) -> None:
        """Write a step."""
        self._write(metrics.to_json())

    def note(self, event: dict[str, Any]) -> None:
        """Write an event."""
        self._write(to_json(event))

    def advance(self, step: int) -> None:
        """Nothing: only reports are recorded."""

    def rewind(self, step: int) -> None:
        """Drop what was written of later steps, as on resume."""
        try:
            self.close()
            _drop_later(self._path, step)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file. Raises UserError if there was no room for the end of it."""
        try:
            self._empty()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._file.close()

    def _write(self, line: str) -> None:
        """Write a line, or keep it: a full disk stops a run no more here than where checkpoints are saved."""
        self._waiting += line.encode() + b"\n"
        try:
            self._empty()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self._unwritable(error) from error
            if not self._told:
                logger.warning("%s: %s: reports wait in memory until there is room", self._path, error.strerror)
            self._told = True

    def _empty(self) -> None:
        """Write what waits. Raises OSError, and keeps what was not written."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written: {error.strerror}; make room and run again")


def _move_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    logger.info("metrics of an earlier run in this folder: moved to %s", aside.name)


def _drop_later(path: Path, resume_step: int) -> None:
    """Keep what belongs to steps up to `resume_step`, and the record of how the job came to go on from where it did."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    kept = [line for number, line in enumerate(lines, 1) if _stays(line, resume_step, f"{path}:{number}")]
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _stays(line: bytes, resume_step: int, where: str) -> bool:
    """A line that is no JSON object was cut off by a kill: drop it, and say so."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        logger.warning("%s: not a whole line of JSON, dropped", where)
        return False
    step = entry.get("step")
    return entry.get("event") in ("resume", "rolled_back") or not isinstance(step, int) or step <= resume_step
