"""Seeds, garbage collection, folders, provenance: what a process sets up or finds out about itself."""

import gc
import logging
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from components.config.job import Debug
from components.runtime import provenance
from components.runtime.collect import GarbageCollector
from components.runtime.errors import ConfigError, UserError
from components.runtime.logging import logger
from components.runtime.paths import prepare_folder, project_root
from components.runtime.provenance import git_revision, versions
from components.runtime.seeds import generator_state, reseed, set_determinism, set_generator_state


@pytest.fixture(autouse=True)
def _messages_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)


@pytest.fixture
def deterministic_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_no_seed_is_zero_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "espalier"):
        assert set_determinism(Debug()) == 0
    assert caplog.messages == ["seed: 0, since debug.seed is not set"]
    assert torch.initial_seed() == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_seed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "espalier"):
        assert set_determinism(Debug(seed=11)) == 11
    assert (caplog.messages, torch.initial_seed()) == ([], 11)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError) as caught:
        set_determinism(Debug(seed=seed))
    assert str(caught.value) == f"debug.seed = {seed}: allowed: 0 to 9223372036854775807"


@pytest.mark.usefixtures("deterministic_state")
@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.shows("debug.deterministic", "debug.deterministic_warn_only")
def test_deterministic(warn_only: bool) -> None:
    set_determinism(Debug(seed=0, deterministic=True, deterministic_warn_only=warn_only))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class _Node:
    """Part of a cycle that only the collector frees."""

    alive = 0

    def __init__(self) -> None:
        self.self = self
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1


@pytest.mark.shows("training.gc_freq")
def test_collects_only_at_due_steps(caplog: pytest.LogCaptureFixture) -> None:
    collector = GarbageCollector(freq=3)
    try:
        _Node()
        assert not gc.isenabled()
        left = []
        for step in (1, 2, 3):
            collector.run(step)
            left.append(_Node.alive)
        assert (left, caplog.messages) == ([1, 1, 0], [])
    finally:
        collector.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_debug_collects_and_logs_every_step(caplog: pytest.LogCaptureFixture) -> None:
    collector = GarbageCollector(freq=100, debug=True)
    try:
        _Node()
        with caplog.at_level(logging.INFO, "espalier"):
            collector.run(7)
        assert _Node.alive == 0
        assert re.fullmatch(r"garbage at step 7: [1-9]\d* objects, \d+\.\d ms", caplog.messages[0])
    finally:
        collector.close()


def test_project_root_holds_the_packages() -> None:
    assert (project_root() / "components" / "runtime" / "paths.py").is_file()


def test_folder_is_created(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "out")
    with pytest.raises(UserError) as caught:
        prepare_folder(path)
    assert str(caught.value) == (
        f"job.dump_folder = {path!r}: cannot write there: Not a directory;"
        " choose another folder with --job.dump_folder=…, or make it writable"
    )


def test_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(UserError, match=r"^job\.dump_folder = '/proc': cannot write there: "):
        prepare_folder("/proc")


def test_versions() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert set(found) == {"espalier", "torch", "python", "platform"}


def _git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t.t")
    return subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    assert git_revision() is None
    _git(tmp_path, "init", "-q")
    assert git_revision() is None  # nothing committed
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "-m", "a")
    _git(tmp_path, "tag", "v1")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert git_revision() == head
    (tmp_path / "a").write_text("2")
    assert git_revision() == f"{head}-dirty"


def draws() -> list[object]:
    return [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]


def test_generators_come_back_bit_for_bit() -> None:
    device = torch.device("cpu")
    set_determinism(Debug(seed=5))
    first = draws()  # an odd number of normal draws: python and numpy keep the second of a pair
    state = generator_state(device)
    after = draws()
    set_determinism(Debug(seed=5))
    assert draws() == first
    set_generator_state(state, device)
    assert draws() == after
    assert len(generator_state(device)) == len(state)


def test_seeding_anew_depends_on_seed_step_and_place() -> None:
    def seeded(*arguments: int) -> list[object]:
        reseed(*arguments)
        return draws()

    assert seeded(5, 3, 0) == seeded(5, 3, 0)
    assert len({str(seeded(*one)) for one in [(5, 3, 0), (6, 3, 0), (5, 4, 0), (5, 3, 1)]}) == 4


def test_what_is_no_state_is_refused() -> None:
    device = torch.device("cpu")
    state = generator_state(device)
    position = len(state) - struct.calcsize("<i?d")
    with pytest.raises(ValueError, match=r"^position 1000000 in numpy's generator$"):
        set_generator_state(state[:position] + struct.pack("<i", 1_000_000) + state[position + 4 :], device)
    for wrong in (b"", state[:-1], bytes(len(state)), b"\xff" * len(state)):
        with pytest.raises(ValueError):  # noqa: PT011  # torch's, python's or struct's words
            set_generator_state(wrong, device)


def test_another_generator_of_numpy_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(UserError, match=r"^numpy's global generator is a PCG64, whose state cannot be saved: "):
        generator_state(torch.device("cpu"))
