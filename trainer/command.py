"""What `python -m trainer` does: one process of a job, or `check`, or `--help`.

Everything up to the Trainer is torch-free, so that a mistake in a config costs a second, not the start of a job. Errors
that are raised on purpose become prose here and nowhere else; what is left is a defect of ours and keeps its traceback.
"""

import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, NoReturn

from components.runtime.errors import CommunicationError, ConfigError, EspalierError
from components.runtime.world import World
from trainer.run_folder import RunFolder
from trainer.urgency import Urgency

if TYPE_CHECKING:
    from trainer.config.load import ResolvedJob
    from trainer.trainer import Trainer


def main(argv: list[str], environ: MutableMapping[str, str]) -> int:
    """Run what the arguments ask for. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no × or − shall not stop a job
    if argv[:1] == ["check"]:
        from trainer.check import run_check

        return run_check(argv[1:], environ)
    if any(argument in ("--help", "-h") for argument in argv):
        from trainer.config.help import help_text

        return report_errors(lambda: print(help_text(), flush=True) or 0)
    return report_errors(lambda: train(argv, environ))


def train(argv: list[str], environ: MutableMapping[str, str]) -> int:
    """Read and validate the job, then train it or, under `comm.mode = "fake_backend"`, say what it would take."""
    from trainer.config.load import resolve
    from trainer.config.output import print_config
    from trainer.run_folder import start_time

    started = start_time(environ)
    resolved = resolve(argv, environ)
    import_custom(resolved.job.experimental.custom_import)
    validate_job(resolved, world_size(resolved, environ))
    if resolved.job.job.print_config and World.from_environ(environ).rank == 0:
        print(print_config(resolved))
    if resolved.job.comm.mode == "fake_backend":
        from trainer.dry_run import dry_run

        return dry_run(resolved.job, resolved.notes, world_size(resolved, environ))
    from components.runtime.files import allow_open_files
    from components.runtime.orphans import end_with_parent
    from components.runtime.witness import explained
    from trainer.stopping import interruptible

    if "TORCHELASTIC_RUN_ID" in environ:
        end_with_parent(environ)
    allow_open_files()
    freeze_registries()
    with explained():
        trainer = trainer_class(resolved)(resolved, environ)
        with interruptible(trainer, environ, started) as over:
            trainer.train()
            over()
            trainer.close()
    return 0


def trainer_class(resolved: "ResolvedJob") -> "type[Trainer]":
    """The Trainer of one rank, or under `comm.mode = "local_tensor"` of all."""
    if resolved.job.comm.mode == "local_tensor":
        from trainer.local import LocalTrainer

        return LocalTrainer
    from trainer.trainer import Trainer

    return Trainer


def import_custom(module: str) -> None:
    """Import the module of `experimental.custom_import`, whose names then count as registered. Raises ConfigError."""
    if not module:
        return
    try:
        importlib.import_module(module)
    except EspalierError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(
            f"experimental.custom_import = {module!r} cannot be imported: {type(error).__name__}: {error}{place(error)}"
        ) from error


def place(error: BaseException) -> str:
    """Where in the user's code an error arose, as ` (file:line)`; empty if it never got that far."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    last = frames[-1]
    return "" if last.filename in (__file__, importlib.__file__) else f" ({last.filename}:{last.lineno})"


def validate_job(resolved: "ResolvedJob", ranks: int) -> None:
    """Every problem of the job on that many ranks, as one ConfigError."""
    from models.train_spec import load_entry_points
    from trainer.config.validate import require_valid

    list(load_entry_points())
    require_valid(resolved, ranks)


def world_size(resolved: "ResolvedJob", environ: MutableMapping[str, str]) -> int:
    """Ranks of the job: those that torchrun started, or in a dry run those that NGPU and NNODES pretend."""
    if resolved.job.comm.mode == "default":
        return World.from_environ(environ).size
    return int(environ.get("NGPU") or "1") * int(environ.get("NNODES") or "1")


def freeze_registries() -> None:
    """Start-up is over: what a TOML can name is known."""
    from components.data.registry import datasets
    from components.loss.cross_entropy import losses
    from components.optim.optimizers import optimizers
    from models.train_spec import families

    for registry in (families, datasets, losses, optimizers):
        registry.freeze()


def leave(code: int) -> NoReturn:
    """End this process. One of several ranks ends without Python's finalization, which is a trap for them.

    Gloo's threads may still want the interpreter to let go of what they sent last, and a thread that asks for it during
    finalization takes the process down with SIGABRT, after all work is done. A rank that failed would wait there for
    peers that no longer answer.
    """
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        if folder := RunFolder.of_worker(os.environ):
            folder.leave_code(World.from_environ(os.environ).local_rank, code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def report_errors(run: Callable[[], int]) -> int:
    """Run, and turn an error that was raised on purpose into a message and its exit code.

    Anything else is a defect of ours, or what a rank meets when another has failed; it keeps its traceback.
    """
    try:
        return run()
    except CommunicationError as error:
        told = "a collective has failed, as told above" if error.told else str(error)
        say(told, os.environ, Urgency.COMMUNICATION)
        return int(error.exit_code)
    except EspalierError as error:
        say(describe(error), os.environ, Urgency.SAID)
        return int(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted", os.environ, Urgency.SAID)
        return 130
    except BrokenPipeError:  # whoever reads standard output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush at exit has a place
        return 128 + signal.SIGPIPE
    except Exception:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        say(traceback.format_exc(), os.environ, Urgency.DEFECT)
        return 1


def describe(error: EspalierError) -> str:
    """An error as prose: a line, or a line for each of its problems."""
    problems = error.problems if isinstance(error, ConfigError) else ()
    if len(problems) < 2:
        return str(error)
    return "\n  ".join([f"{len(problems)} problems in the configuration", *problems])


def say(message: str, environ: MutableMapping[str, str], urgency: Urgency) -> None:
    """Print an error; a worker of torchrun hands it to the launcher instead, which prints the one that matters."""
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        now = time.time()
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": int(now), "at": now, "urgency": urgency}, file)
    else:
        print(f"error: {message}", file=sys.stderr)
