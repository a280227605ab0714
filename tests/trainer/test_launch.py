"""`run_train.sh` as a user starts it: real processes, real output, real exit codes."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from components.runtime.errors import ConfigError
from tests.trainer.runs import ROOT, TINY, facts, records
from trainer.guard import shadowed_rooms
from trainer.launch import set_patience, torchrun_arguments
from trainer.run_folder import start_time

QUIET = (*TINY, "--validation.enable=false")
SCRIPT = ROOT / "run_train.sh"
STEP = re.compile(r"step +\d+  loss +\d+\.\d{5}  max_loss +\d+\.\d{5}  grad_norm +\d+\.\d+  lr \S+  tokens/s +\d+  ")


def environment(**variables: str) -> dict[str, str]:
    """This interpreter as the active environment, and nothing of the outer job's."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CONFIG_FILE", "NGPU", "COMM_MODE")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    usual = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "ESPALIER_DEVICE": "cpu"}
    return {**kept, **usual, **variables}


def run(*arguments: str, cwd: Path = ROOT, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=100
    )


def test_two_processes_agree_with_one_and_only_one_reports(tmp_path: Path) -> None:
    """The README's claim: NGPU is a layout. A pipe gets one line for each step, and nothing else on stdout."""
    for ranks in ("1", "2"):
        done = run(*QUIET, f"--job.dump_folder={tmp_path / ranks}", NGPU=ranks)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        assert all(STEP.match(line) for line in lines), lines
        assert "layout: " + ranks in done.stderr
        assert done.stderr.count("layout: ") == 1
    one, two = records(tmp_path / "1"), records(tmp_path / "2")
    assert [facts(record) for record in two] == [pytest.approx(facts(record), rel=1e-5) for record in one]


def test_a_worker_s_error_is_told_once_with_its_exit_code(tmp_path: Path) -> None:
    done = run(*QUIET, f"--job.dump_folder={tmp_path}", "--training.dataset_path=nowhere", NGPU="2")
    assert done.returncode == 2
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(said) == 1
    assert re.fullmatch(r"error: \[rank [01]\] nowhere: no such file or folder .*", said[0])
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(*QUIET, f"--job.dump_folder={tmp_path}", NGPU="2", MASTER_PORT=port)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: the ranks cannot meet at localhost:{port}: the port is taken or not reachable; set MASTER_PORT to a"
        " free one, and MASTER_ADDR to the machine with NODE_RANK=0"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NGPU": "0"}, "NGPU=0: must be an integer of at least 1"),
        ({"NGPU": "two"}, "NGPU=two: must be an integer of at least 1"),
        ({"CONFIG_FILE": "nowhere.toml"}, "nowhere.toml: cannot be read: No such file or directory; check the path"),
        ({"COMM_MODE": "pretend"}, 'COMM_MODE=pretend: must be one of "default", "fake_backend", "local_tensor"'),
    ],
)
def test_bad_variables(variables: Mapping[str, str], message: str) -> None:
    done = subprocess.run([SCRIPT], env=environment(**variables), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stdout == ""


def test_the_agent_waits_for_a_save_with_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its setting where there is one, else by what it calls."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    waited: list[int] = []

    def close(self: object, death_sig: object = None, timeout: int = 30) -> None:
        waited.append(timeout)

    monkeypatch.setattr(PContext, "close", close)
    old, new = LaunchConfig(1, 1, 1), LaunchConfig(1, 1, 1)
    if not hasattr(new, "shutdown_timeout"):
        new.shutdown_timeout = 30
    set_patience(new, 315)
    assert new.shutdown_timeout == 315
    cast(Any, PContext).close(object())
    vars(old).pop("shutdown_timeout", None)
    monkeypatch.delattr(LaunchConfig, "shutdown_timeout", raising=False)
    set_patience(old, 315)
    cast(Any, PContext).close(object())
    assert waited == [30, 315]


def test_a_folder_that_shadows_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("")
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: `models` is {tmp_path / 'models'} instead of Espalier's {ROOT / 'models'}: run from another folder,"
        " or rename that one\n"
    )
    assert shadowed_rooms() == []


def test_several_machines_pass_their_variables_on() -> None:
    environ = {"NODE_RANK": "1", "MASTER_ADDR": "host-a", "MASTER_PORT": "29501"}
    assert torchrun_arguments(environ, 8, 2) == [
        "--nproc-per-node=8",
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=host-a",
        "--master-port=29501",
    ]
    assert torchrun_arguments({}, 2, 1)[2:] == ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize("text", ["noon", "nan", "inf"])
def test_a_start_that_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match=f"ESPALIER_STARTED = '{text}': must be in seconds since 1970"):
        start_time({"ESPALIER_STARTED": text})


@pytest.mark.slow
def test_two_machines_train_one_job(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [
        subprocess.Popen(
            [SCRIPT, *QUIET, f"--job.dump_folder={tmp_path}"],
            env=environment(NGPU="1", NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=100) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [len(out.splitlines()) for out, _ in outputs] == [3, 0]
    assert "layout: 2 × cpu" in outputs[0][1]


def test_a_terminal_gets_a_bar_with_the_time_that_is_left(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    argv = [SCRIPT, *QUIET, f"--job.dump_folder={tmp_path}", "--training.steps=6"]
    with subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", COLUMNS="150")) as child:
        os.close(theirs)
        seen = b""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the child has closed its end
                break
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()
    assert child.returncode == 0, text
    assert "6/6" in text
    assert "0:00:0" in text
    assert re.search(r"step +6 +loss", text)


def test_the_active_environment_is_taken_if_it_satisfies_the_ranges(tmp_path: Path) -> None:
    def setup(**variables: str) -> str:
        command = [ROOT / "scripts/setup.sh"]
        return subprocess.run(
            command, env=environment(**variables), capture_output=True, text=True, check=True
        ).stdout.strip()

    active = Path(setup())
    assert active.resolve() == Path(sys.executable).resolve()
    assert setup() == str(active)


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A job of two ranks that runs until it is stopped, returned once it trains."""
    child = subprocess.Popen(
        [SCRIPT, *QUIET, f"--job.dump_folder={folder}", "--training.steps=100000", *arguments],
        env=environment(NGPU="2", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("step")
    return child


def workers(launcher: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True)
    return sorted(int(pid) for pid in found.stdout.split())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_ranks_in_one_line(number: signal.Signals, code: int, tmp_path: Path) -> None:
    child = start(tmp_path)
    ranks = workers(child.pid)
    assert len(ranks) == 2
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err.splitlines()[-1] == f"error: stopped by {number.name}"
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    child = start(tmp_path)
    os.kill(workers(child.pid)[1], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGKILL
    assert re.match(r"error: \[rank [01]\] Signal 9 \(SIGKILL\) received by PID \d+", err.splitlines()[-1])
    assert "Traceback" not in err


def test_an_error_of_one_rank_is_not_drowned_by_the_others(tmp_path: Path) -> None:
    """Rank 1 reads a bad record; rank 0 then finds its collective broken, which is no news."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good words, many of them"}\n' * 40 + "{\n")
    arguments = (f"--training.dataset_path={data}", "--data.shuffle=false", "--training.seq_len=4")
    done = run(*QUIET, *arguments, f"--job.dump_folder={tmp_path}", "--training.steps=50", NGPU="2")
    assert done.returncode == 2
    assert re.match(r"error: \[rank [01]\] \S*data.jsonl:41:2: truncated JSON ", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    child = start(tmp_path)
    ranks = workers(child.pid)
    child.kill()
    child.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    for arguments in ("--help", "check", f"--job.dump_folder={tmp_path} {' '.join(QUIET)}"):
        command = f"set -o pipefail; {SCRIPT} {arguments} | head -n 1; echo code ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=100)
        assert "Traceback" not in done.stderr
        assert done.stdout.splitlines()[-1] in ("code 0", "code 141")
