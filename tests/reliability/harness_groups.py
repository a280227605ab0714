"""Whole jobs as a user starts them, `run_train.sh` with its agent and two ranks, killed at once and with no warning."""

import os
import random
import re
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.reliability.harness_jobs import SAVING, check_folder, load_all, put_foreign, same, saved_steps
from tests.trainer.runs import ROOT, facts, records

STEPS = 40
MARK = "ESPALIER_TEST_MARK"
ENDS_WITHIN = 10.0  # seconds that the ranks get to see that their launcher is gone
STARTS_WITHIN = 120.0


def alive(mark: str) -> list[int]:
    """Processes that have this mark in their environment, whoever their parent is now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended in between
            if mark.encode() in (folder / "environ").read_bytes() and "(zombie)" not in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


class Group:
    """One start of the job, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.log = secrets.token_hex(8), folder.with_name(f"{folder.name}.log")
        kept = {key: value for key, value in os.environ.items() if key not in ("CONFIG_FILE", "COMM_MODE")}
        argv = [
            ROOT / "run_train.sh",
            *SAVING,
            "--training.local_batch_size=1",
            f"--training.steps={STEPS}",
            f"--job.dump_folder={folder}",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                env={**kept, "NGPU": "2", MARK: self.mark},
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> bool:
        """Whether the job says this before it ends."""
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and self.process.poll() is None:
            if text in self.text():
                return True
            time.sleep(0.01)
        return False

    def kill(self) -> bool:
        """Kill the group; whether there was one. No rank is left a while later."""
        was = self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + ENDS_WITHIN
        while (left := alive(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"still there {ENDS_WITHIN} s after their launcher was killed: {left}\n{self.text()}"
        return was


def resumed_from(text: str) -> int | None:
    found = re.search(r"^loaded step-(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def whole(folder: Path) -> Path:
    """The job that nobody disturbed."""
    group = Group(folder)
    assert group.process.wait(timeout=STARTS_WITHIN) == 0, group.text()
    return folder


def kill_groups(folder: Path, reference: Path, kills: int, seed: int) -> int:
    """One job, its group killed up to that many times, then left to finish; how many kills there were."""
    dice, done, root = random.Random(seed), 0, folder / "checkpoint"
    put_foreign(root)
    while done < kills:
        before = max(saved_steps(root), default=None)
        group = Group(folder)
        if dice.random() < 0.8:
            group.wait_for("saved step-")
            time.sleep(dice.uniform(0, 1.5))
        else:
            time.sleep(dice.uniform(0, 8))
        if not group.kill():
            break
        done += 1
        assert resumed_from(group.text()) in (None, before), group.text()
        assert "falling back" not in group.text()
        check_folder(root, max(saved_steps(root), default=None))
    finish(folder, reference)
    return done


def finish(folder: Path, reference: Path) -> None:
    """Undisturbed to the end: the same losses and weights as if nothing had happened."""
    before = max(saved_steps(folder / "checkpoint"), default=None)
    group = Group(folder)
    assert group.process.wait(timeout=STARTS_WITHIN) == 0, group.text()
    assert before == STEPS or resumed_from(group.text()) == before
    assert [facts(record) for record in records(folder)] == [facts(record) for record in records(reference)]
    assert [record["step"] for record in records(folder)] == [*range(1, STEPS + 1)]
    (weights, state), (expected, at) = (load_all(each / "checkpoint", STEPS) for each in (folder, reference))
    assert same(weights, expected)
    assert state == at
