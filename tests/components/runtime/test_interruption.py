"""Requests: in one order for all ranks, whoever asks; and how signals become requests, with actions that only note."""

import os
import resource
import signal
import time
from typing import NoReturn

import pytest
import torch.distributed as dist

from components.runtime.errors import CheckpointError, DataError
from components.runtime.gate import Gate
from components.runtime.interruption import Actions, Interruption
from components.runtime.requests import OwnRequests, Request, SharedRequests, Wish

SAVE, STOP, FAIL, DONE = (Request(wish, f"because of {wish}") for wish in (Wish.SAVE, Wish.STOP, Wish.FAIL, Wish.DONE))


@pytest.mark.parametrize("shared", [False, True])
def test_a_number_has_one_request(shared: bool) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    first, second = [SharedRequests(store, rank, 2, 10) for rank in range(2)] if shared else [OwnRequests()] * 2
    assert first.write(0, SAVE) == SAVE
    assert second.write(0, STOP) == SAVE
    assert second.write(1, STOP) == STOP
    assert [second.wait(0), first.wait(1)] == [SAVE, STOP]


def test_ranks_that_lag_are_known() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    ranks = [SharedRequests(store, rank, 3, 10) for rank in range(3)]
    ranks[0].reached(7, 2)
    ranks[2].reached(7, 1)
    assert ranks[1].stages(7) == [2, 0, 1]


@pytest.mark.parametrize(
    ("asked", "there", "met"),
    [
        (SAVE, STOP, True),
        (STOP, SAVE, False),
        (DONE, SAVE, False),
        (FAIL, SAVE, False),
        (FAIL, STOP, True),
        (STOP, FAIL, True),
    ],
)
def test_a_stop_saves_too(asked: Request, there: Request, met: bool) -> None:
    assert asked.met_by(there) == met


def leave(code: int) -> NoReturn:
    raise SystemExit(code)


def interruption(saved: list[str], ends_at: float | None = None) -> Interruption:
    actions = Actions(lambda request: saved.append(request.reason), lambda request: 75, leave, lambda: "nowhere")
    return Interruption(Gate(), None, actions, grace=10, ends_at=ends_at)


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    descriptor = signal.set_wakeup_fd(-1)
    with interruption([]).around() as over:
        over()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(descriptor) == -1


def test_a_save_comes_while_the_main_thread_waits_and_errors_pass_after_it() -> None:
    saved: list[str] = []

    def fail() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), interruption(saved).around():
        fail()
    assert saved == ["SIGUSR1"]


def test_failed_data_are_saved_before_their_error_ends_the_training() -> None:
    saved: list[str] = []
    with pytest.raises(DataError, match=r"^gone: all of it\nmend it$"), interruption(saved).around():
        raise DataError("gone: all of it\nmend it")
    assert saved == ["gone: all of it"]


def test_failed_data_of_which_nothing_can_be_saved() -> None:
    def fails(request: Request) -> None:
        raise CheckpointError("no space left")

    actions = Actions(fails, lambda request: 2, leave, lambda: "nowhere")
    watched = Interruption(Gate(), None, actions, grace=10, ends_at=None)
    with pytest.raises(DataError, match=r"^gone$"), watched.around():
        raise DataError("gone")


def test_what_comes_after_the_end_is_ignored() -> None:
    saved: list[str] = []
    with interruption(saved).around() as over:
        over()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert saved == []


class Late(OwnRequests):
    """News of a request takes its time."""

    def wait(self, number: int) -> Request:
        request = super().wait(number)
        time.sleep(0.3)
        return request


def test_a_stop_that_another_ranks_end_has_forestalled_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, saved = Late(), list[str]()
    monkeypatch.setattr("components.runtime.interruption._requests", lambda *_: requests)
    with interruption(saved).around() as over:
        requests.write(0, DONE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        over()
    assert saved == []


def test_signals_are_heard_where_many_files_are_open() -> None:
    """As on a rank that is connected to a thousand others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    saved, files = list[str](), list[int]()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        files += [os.dup(1) for _ in range(1100)]
        with interruption(saved).around() as over:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            over()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert saved == ["SIGUSR1"]


def test_signals_are_heard_where_the_limit_is_centuries_away() -> None:
    saved: list[str] = []
    with interruption(saved, ends_at=1e12).around() as over:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        over()
    assert saved == ["SIGUSR1"]
