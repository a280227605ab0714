"""Ranks for tests: `run_ranks(4, fn, *args)` calls fn on four ranks over gloo and gives their results back.

A server process, started once per test session, imports torch and what the distributed parts import lazily, and then
only forks. Eight ranks start in a second that way; torchrun, which imports torch in every rank, takes ten times as
long. Forking pytest itself was rejected: it has threads and whatever state earlier tests left behind.

A rank's standard output and error go to a file, whose end is shown when the rank fails.
"""

import functools
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 3.0  # what the other ranks get to end by themselves once one has failed
LOG_CHARACTERS = 3000
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch.aot_autograd",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "pytest",
    "trainer.trainer",
    "trainer.command",
    "trainer.config.validate",
    "components.data.build",
    "components.loss.cross_entropy",
    "components.metrics.sinks",
    "components.parallel.pipeline_run",
    "components.optim.optimizers",
    "models.llama3.spec",
    "models.qwen3.spec",
)
"""What ranks find imported. The project's own modules as they are when the server starts: 1.3 s of each rank."""


class RankError(Exception):
    """A rank raised, died, or ran out of time. The message holds its traceback and the end of its output."""


@dataclass(frozen=True)
class Request:
    """One call, as sent to the server. `fn` and `args` stay pickled until the rank has imported the test's module."""

    ranks: int
    module: str
    module_file: str
    call: bytes
    folder: str
    timeout: float
    backend: str | None


def run_ranks(
    n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60, backend: str | None = "gloo"
) -> list[Any]:
    """Call `fn(*args)` on n ranks; the results in order of rank.

    fn is a function at module level; arguments and results can be pickled. Each rank has a process group (RANK,
    LOCAL_RANK and WORLD_SIZE are set) and one thread. With `backend=None` no process group is initialized: a fresh
    process for code that makes its own. Raises RankError with the traceback of the rank that failed first; after
    `timeout` seconds all ranks are killed.
    """
    module = sys.modules[fn.__module__]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = pickle.dumps((fn, args))
        request = Request(n, fn.__module__, module.__file__ or "", call, folder, timeout, backend)
        failed: list[tuple[int, str]] = _server().ask(request)  # the first to fail first
        if failed:
            raise RankError("\n".join(_report(Path(folder), rank, why) for rank, why in failed[:1]))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(n)]


def _report(folder: Path, rank: int, why: str) -> str:
    error = folder / f"{rank}.error"
    text = error.read_text() if error.exists() else why
    log = (folder / f"{rank}.log").read_text(errors="replace")[-LOG_CHARACTERS:]
    return f"rank {rank}: {text}" + (f"\n--- output of rank {rank}:\n{log}" if log else "")


class Server:
    """The parent's end of a server process, which `python -m module` runs: a request, an answer, and so on.

    It ends when its standard input closes. `more`: variables of its environment.
    """

    def __init__(self, module: str, **more: str) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **more,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, request: Any) -> Any:
        """Its answer. Raises RankError if it has ended."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RankError("the fork server has no pipes")
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        try:
            return pickle.load(self._process.stdout)
        except EOFError as error:
            raise RankError(f"the fork server ended with exit code {self._process.wait()}") from error


@functools.cache
def _server() -> Server:
    return Server("tests.ranks")


def _serve(requests: BinaryIO, answers: BinaryIO, answer: Callable[[Any], Any]) -> None:
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(answer(request), answers)
        answers.flush()


def _run(request: Request) -> list[tuple[int, str]]:
    """Fork the ranks of a request and wait for them; those that failed, each with how its process ended."""
    children = {_fork(request, rank): rank for rank in range(request.ranks)}
    return _wait(children, request.timeout)


def _wait(children: dict[int, int], timeout: float) -> list[tuple[int, str]]:
    """Wait for children (pid → rank), kill what is left at the deadline; those that failed, in order of failing."""
    deadline, failed = time.monotonic() + timeout, []
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank, code = children.pop(pid), os.waitstatus_to_exitcode(status)
            if code:
                failed.append((rank, f"ended with exit code {code}"))
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() > deadline:
            failed += [(rank, f"killed after {timeout} s") for rank in children.values()]
            _kill(children)
        else:
            time.sleep(0.005)
    return failed


def _kill(children: dict[int, int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    children.clear()


def _fork(request: Request, rank: int) -> int:
    """Start one rank; its process id."""
    pid = os.fork()
    if not pid:
        _child(request, rank)
    return pid


def _child(request: Request, rank: int) -> NoReturn:
    """The forked process: run the rank, leave its result or its traceback in a file, and end."""
    folder = Path(request.folder)
    redirect(folder / f"{rank}.log")
    code = 1
    try:
        (folder / f"{rank}.result").write_bytes(pickle.dumps(_rank(request, rank)))
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no destructors: a process group that is torn down waits for its peers


def redirect(path: Path) -> None:
    """Have this process write its standard output and error there."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _rank(request: Request, rank: int) -> Any:
    """What one rank does: process group, the test's module, the call; then wait for the others, so none is cut off."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request.ranks))
    if request.backend:
        dist.init_process_group(
            request.backend,
            init_method=f"file://{request.folder}/store",
            rank=rank,
            world_size=request.ranks,
            timeout=timedelta(seconds=request.timeout),
        )
    _import(request.module, request.module_file)
    fn, args = pickle.loads(request.call)
    result = fn(*args)
    if request.backend and dist.is_initialized():
        dist.barrier()
    return result


def _import(name: str, file: str) -> ModuleType:
    """Import a test's module under the name that pytest gave it, which need not be one that sys.path leads to."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def serve(preloaded: Sequence[str], answer: Callable[[Any], Any]) -> None:
    """The server process: keep the pipe to the parent to itself, import once, and answer to each request."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in preloaded:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()  # else each rank that collects garbage looks through all of torch for it, which takes 0.3 s
    _serve(sys.stdin.buffer, answers, answer)


def _main() -> None:
    serve(PRELOADED, _run)


if __name__ == "__main__":
    # Under `-m` this file is `__main__`; requests name it `tests.ranks`, so serve from that module.
    importlib.import_module("tests.ranks")._main()
