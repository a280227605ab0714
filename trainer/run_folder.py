"""What workers leave for their launcher, in a folder that it makes and names in ESPALIER_RUN_DIR.

torchrun turns a worker's exit code 75 into a failure of its own, ends the others and, under `--max-restarts`, starts
all again. So a worker that ends a stop leaves its code here and exits with 0, and the launcher returns the code. The
first worker leaves its process id too: SIGUSR1 is for one of them to get. Each file is renamed into place, and belongs
to one attempt: a restarted worker does not see what the last one left. Rejected: torchrun's error files, which it reads
only of workers that failed. Torch-free, and imports nothing of ours at the top: see `guard`.
"""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "ESPALIER_RUN_DIR"
STARTED = "ESPALIER_STARTED"
"""Variable with the seconds since 1970 at which the job began, from where `training.exit_after` counts."""


def start_time(environ: Mapping[str, str]) -> float:
    """When the job began, in seconds since 1970: what the launcher or the user says, else now. Raises ConfigError."""
    from components.runtime.errors import ConfigError

    text = environ.get(STARTED, "")
    try:
        started = float(text) if text else time.time()
    except ValueError:
        started = math.nan
    if not math.isfinite(started):
        raise ConfigError(
            f"environment: {STARTED} = {text!r}: must be in seconds since 1970, as `date +%s` prints them"
        )
    return started


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started the workers again."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT") or "0")


class RunFolder:
    """Of one machine's workers; `attempt` counts torchrun's restarts."""

    def __init__(self, path: Path | str, attempt: int = 0) -> None:
        self._path, self._attempt = Path(path), attempt

    @classmethod
    def of_worker(cls, environ: Mapping[str, str]) -> "RunFolder | None":
        """The one that the launcher has made; None without our launcher."""
        if VARIABLE not in environ or "TORCHELASTIC_RUN_ID" not in environ:
            return None
        return cls(environ[VARIABLE], restart_count(environ))

    def leave_code(self, local_rank: int, code: int) -> None:
        """From a worker: what it ends with."""
        self._leave(f"{self._attempt}-{local_rank}.code", code)

    def leave_pid(self) -> None:
        """From the first worker, once it listens to signals."""
        self._leave("pid", os.getpid())

    def code(self, workers: int) -> int | None:
        """For the launcher: the code of the last attempt's workers; None unless all of them have left one.

        0 if all have, else 75 if those that have not were stopped, else the first of another kind.
        """
        left = {path.stem: int(path.read_text()) for path in self._path.glob("*.code")}
        attempt = max((int(name.partition("-")[0]) for name in left), default=0)
        codes = [left.get(f"{attempt}-{rank}") for rank in range(workers)]
        found = [code for code in codes if code is not None]
        if len(found) < workers:
            return None
        return next((code for code in found if code not in (0, 75)), max(found))

    def first_worker(self) -> int | None:
        """For the launcher: the process id of its first worker; None if that does not listen, or is none of its."""
        try:
            pid = int((self._path / "pid").read_text())
            return pid if _is_child(pid) else None
        except FileNotFoundError:
            return None

    def _leave(self, name: str, number: int) -> None:
        beside = self._path / f"{name}.{os.getpid()}"
        beside.write_text(str(number))
        beside.replace(self._path / name)


def _is_child(pid: int) -> bool:
    """Whether it is a living child of this process; its number may have gone to a stranger. Asking reaps nothing."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
