"""`run_train.sh` in Python: how many processes, started how, ended with which code.

One process is this process. Several are torchrun's agent, called as a library: its own script answers a worker that
failed with a traceback of the agent and exit code 1, where a user needs the worker's message once, and its code. The
agent passes SIGTERM and SIGINT on and then waits, for as long as the workers may take to save; SIGUSR1 is passed on
here. What the workers end a stop with they leave in the run folder.
Rejected: a launcher of our own. torchrun's rendezvous, restarts and signal handling are well kept.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from components.runtime.files import allow_open_files
from components.runtime.orphans import LAUNCHER
from trainer.environment import count
from trainer.guard import guard_rooms
from trainer.run_folder import STARTED, VARIABLE, RunFolder, start_time
from trainer.urgency import Urgency

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

SHUTDOWN_MARGIN = 15
"""Seconds from the end of the workers' own grace to that of the agent's patience."""
ECHO_SECONDS = 3.0
"""As long as the workers take a second signal for the first one's echo, so does the launcher."""


def visible_accelerators() -> int:
    """Number of accelerators; 0 without any. Imports torch only where a driver's device files exist."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def torchrun_arguments(environ: Mapping[str, str], processes: int, nodes: int) -> list[str]:
    """torchrun's options for this layout of processes."""
    options = [f"--nproc-per-node={processes}", f"--nnodes={nodes}"]
    if restarts := count(environ, "MAX_RESTARTS", 0, least=0):
        options.append(f"--max-restarts={restarts}")
    if nodes == 1 and "MASTER_PORT" not in environ:
        return [*options, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [
        *options,
        f"--node-rank={count(environ, 'NODE_RANK', 0, least=0)}",
        f"--master-addr={environ.get('MASTER_ADDR', 'localhost')}",
        f"--master-port={count(environ, 'MASTER_PORT', 29500)}",
    ]


def run_workers(argv: list[str], environ: MutableMapping[str, str], processes: int, nodes: int) -> int:
    """Start the workers of this machine, wait for them, and return the exit code of the first that failed, else 0.

    A signal ends the workers. If all of them say how, that is the code, 75 with a checkpoint; else it is 128 plus the
    signal's number. Raises ConfigError for a job that cannot be read.
    """
    patience = shutdown_seconds(argv, environ)
    allow_open_files()  # the agent hosts the store of the ranks
    with tempfile.TemporaryDirectory(prefix="espalier-", ignore_cleanup_errors=True) as path:
        environ[VARIABLE], environ[LAUNCHER] = path, str(os.getpid())
        environ[STARTED] = str(start_time(environ))
        folder = RunFolder(path)
        pass_on(folder)
        return run_agent(argv, environ, processes, nodes, patience, folder)


def run_agent(
    argv: list[str],
    environ: MutableMapping[str, str],
    processes: int,
    nodes: int,
    patience: int | None,
    folder: RunFolder,
) -> int:
    """Run torchrun's agent to its end. `patience`: seconds that signalled workers get; None for torchrun's own."""
    import logging

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # The agent's own account of a failure repeats what the worker says, at length.
    for name in filter(lambda name: name.startswith("torch.distributed.elastic"), logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    options = torchrun_arguments(environ, processes, nodes)
    config, command, arguments = config_from_args(parse_args([*options, "-m", "trainer", *argv]))
    if patience is not None:
        set_patience(config, patience)
    try:
        with answering_signals(config):
            elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: urgency(item[1]))
        print(f"error: [rank {rank}] {told(failure)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        code = folder.code(processes)
        if code is None or code >= 128:
            print(f"error: stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval if code is None else code
    except DistError:
        print(f"error: {rendezvous_problem(environ)}", file=sys.stderr)
        return 2
    return folder.code(processes) or 0


def shutdown_seconds(argv: list[str], environ: Mapping[str, str]) -> int | None:
    """How long the agent waits for signalled workers before it kills them; None if they have nothing to save."""
    from trainer.config.load import resolve

    checkpoint = resolve(argv, environ).job.checkpoint  # what else is wrong with the job, its workers will say
    saves = checkpoint.enable and not checkpoint.load_only
    return checkpoint.grace_seconds + SHUTDOWN_MARGIN if saves else None


def set_patience(config: "LaunchConfig", seconds: int) -> None:
    """Let the agent wait so long for signalled workers before it kills them."""
    if hasattr(config, "shutdown_timeout"):
        config.shutdown_timeout = seconds
        return
    # Earlier versions of torch have 30 s written into the agent's call of this.
    from torch.distributed.elastic.multiprocessing.api import PContext

    setattr(PContext, "close", partialmethod(PContext.close, timeout=seconds))  # noqa: B010  # a class of torch's


@contextmanager
def answering_signals(config: "LaunchConfig") -> Iterator[None]:
    """Answer SIGTERM and SIGINT as the agent would, but not the echoes of the first: who is hasty loses no save.

    The agent passes the first two on. At the third it leaves, and its workers are killed (`orphans`), saved or not.
    Once the agent has ended, so is the job, and no signal changes its code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    first: float | None = None

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and now - first <= ECHO_SECONDS:
            return
        first = first or now
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))

    config.signals_to_handle = "SIGHUP,SIGQUIT"  # those that are left to the agent
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def pass_on(folder: RunFolder) -> None:
    """Give SIGUSR1 to the first worker, which tells the others; before the workers listen there is nothing to save."""

    def forward(number: int, frame: FrameType | None) -> None:
        if worker := folder.first_worker():
            os.kill(worker, number)
        else:
            print("SIGUSR1: nothing is being trained, so nothing is saved", file=sys.stderr)

    signal.signal(signal.SIGUSR1, forward)


def urgency(failure: "ProcessFailure") -> tuple[int, float]:
    """Order of failures: by kind, and of one kind the earliest first.

    When one rank fails, the others find their collectives broken and fail too, often within the same second; and who is
    left is ended by the agent, with SIGTERM, then with SIGKILL. So these say something only where nobody else does.
    """
    data, last = failure.error_file_data, (-signal.SIGKILL, -signal.SIGTERM)
    if failure.exitcode in last and "urgency" not in data:
        return Urgency.ENDED + last.index(failure.exitcode), 0.0
    return data.get("urgency", Urgency.DEFECT), data.get("at", 0.0)


def told(failure: "ProcessFailure") -> str:
    """What a worker left in its error file, or how it died."""
    said = failure.error_file_data.get("at") is not None
    return failure.message if said or failure.exitcode < 0 else "failed; its output is above"


def rendezvous_problem(environ: Mapping[str, str]) -> str:
    """What to say when the machines cannot find each other, or the port is taken."""
    address = f"{environ.get('MASTER_ADDR', 'localhost')}:{environ.get('MASTER_PORT', '29500')}"
    return (
        f"the ranks cannot meet at {address}: the port is taken or not reachable; set MASTER_PORT to a free one, and"
        " MASTER_ADDR to the machine with NODE_RANK=0"
    )


def launch(argv: list[str], environ: MutableMapping[str, str]) -> int:
    """Run the job that the environment and the arguments describe. Returns the exit code."""
    from trainer.command import main, report_errors

    def start() -> int:
        fake = environ.get("COMM_MODE", "default") == "fake_backend"
        processes = count(environ, "NGPU", 1 if fake else visible_accelerators() or 1)
        nodes = count(environ, "NNODES", 1)
        environ["NGPU"], environ["NNODES"] = str(processes), str(nodes)
        if fake or environ.get("COMM_MODE") == "local_tensor" or processes * nodes == 1 or wants_no_job(argv):
            return main(argv, environ)
        return run_workers(argv, environ, processes, nodes)

    return report_errors(start)


def wants_no_job(argv: list[str]) -> bool:
    """Whether the arguments ask for something that one process answers."""
    return bool(argv) and argv[0] in ("check", "--help", "-h")


if __name__ == "__main__":
    guard_rooms()
    sys.exit(launch(sys.argv[1:], os.environ))
