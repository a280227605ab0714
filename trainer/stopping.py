"""What a job does when it is interrupted (`components.runtime.interruption`): saves what is settled, tells, and ends.

All of it runs beside the training thread, which may stand anywhere between two sections of the gate. So it reads what
belongs to the last section (`Trainer.settled`), never what the training thread is at.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch

from components.runtime import distributed
from components.runtime.errors import ExitCode
from components.runtime.interruption import SIGNALS, Actions, Interruption
from components.runtime.logging import logger
from components.runtime.requests import Request, Wish
from trainer.report import tell_data_at_a_stop
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from trainer.trainer import Trainer

MARGIN_SECONDS = 60
"""By how much the ranks' communication is more patient than the grace, so that the grace is what is told of."""
REPORT_SECONDS = 5.0
FLUSH_SECONDS = 1.0


@contextmanager
def interruptible(trainer: Trainer, environ: Mapping[str, str], started: float) -> Iterator[Callable[[], None]]:
    """Around `Trainer.train`; gives what is to be called when it is over. Collective.

    Where nothing is saved, signals keep their meaning.
    """
    config, limit = trainer.job.checkpoint, trainer.job.training.exit_after
    if not config.enable or config.load_only or config.create_seed_checkpoint:
        yield lambda: None
        return
    _ = trainer.parts.tensors  # looked up while the models are at rest
    group = distributed.new_host_group("interruption", config.grace_seconds + MARGIN_SECONDS)
    stop = Stop(trainer, environ, group)
    actions = Actions(stop.save, stop.end, stop.leave, lambda: str(trainer.standing))
    ends_at = started + limit if limit else None
    with Interruption(trainer.gate, group, actions, grace=config.grace_seconds, ends_at=ends_at).around() as over:
        folder = RunFolder.of_worker(environ)
        if folder and trainer.world.local_rank == 0:
            folder.leave_pid()
        yield over
    for number in SIGNALS:  # the job is done: what comes while its parts are taken down is no failure of it
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """The `Actions` of a Trainer. `group`: all ranks, for none but the keeper's thread; None for one rank."""

    def __init__(self, trainer: Trainer, environ: Mapping[str, str], group: ProcessGroup | None) -> None:
        self.trainer, self.environ, self.group = trainer, environ, group
        self.finished = False

    def save(self, request: Request) -> None:
        """Save what is settled, unless it is saved. Raises CheckpointError.

        A job whose data fail in its first step has nothing to lose: saved, it would refuse to go on with other data.
        """
        trainer = self.trainer
        step = trainer.settled.step
        if request.wish == Wish.FAIL and not step:
            return
        self._use_own_stream()
        if trainer.persistence.ensure_saved(trainer.settled, trainer.parts, trainer.identity):
            self.finished = step == trainer.job.training.steps
        if request.wish == Wish.SAVE:
            trainer.sinks.note({"event": "saved_on_signal", "step": step, "reason": request.reason})

    def end(self, request: Request) -> int:
        """Tell what a job tells at its end, and close the reports; the exit code. Collective."""
        trainer = self.trainer
        step = trainer.settled.step
        if trainer.reporting.acquire(timeout=REPORT_SECONDS):  # else the training thread is stuck in a report
            try:
                if trainer.reports(step):
                    trainer.report()
            finally:
                trainer.reporting.release()
        failed = request.wish == Wish.FAIL
        if failed or not self.finished:
            trainer.sinks.note({"event": "stopped", "step": step, "reason": request.reason})
        try:
            tell_data_at_a_stop(trainer, self.group)
        finally:
            trainer.sinks.close()
        if failed:
            if step:
                logger.info("step %d is saved; once the data are mended, the same command goes on from there", step)
            return ExitCode.INPUT
        if self.finished:
            return ExitCode.DONE
        logger.info("%s: stopped after step %d; the same command goes on from there", request.reason, step)
        return ExitCode.STOPPED

    def leave(self, code: int) -> NoReturn:
        """End this process. A launcher that knows of us is told the code; torchrun alone must take 75 for success, and
        so it must 2, on the ranks whose data did not fail."""
        flushing = threading.Thread(target=_flush, daemon=True)  # the training thread may hold their locks
        flushing.start()
        flushing.join(FLUSH_SECONDS)
        if folder := RunFolder.of_worker(self.environ):
            folder.leave_code(self.trainer.world.local_rank, code)
            os._exit(0)
        told = code in (ExitCode.STOPPED, ExitCode.INPUT)  # 2: by the rank whose data failed
        os._exit(0 if told and "TORCHELASTIC_RUN_ID" in self.environ else code)

    def _use_own_stream(self) -> None:
        """Copy from the device as soon as the settled step is there, not after what training has put there since."""
        device = self.trainer.device
        if device.type == "cpu":
            return
        torch.accelerator.set_device_index(device.index)
        stream = torch.Stream(device)
        if self.trainer.settled_event is not None:
            stream.wait_event(self.trainer.settled_event)
        torch.accelerator.set_stream(stream)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
