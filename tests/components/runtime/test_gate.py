"""The gate: a training thread is held back between sections, at the same number on all ranks, and never within one."""

import threading
import time
from collections.abc import Callable

import pytest

from components.runtime.gate import Gate


def train(gate: Gate, done: list[int], within: Callable[[int], None] = lambda n: None) -> threading.Thread:
    """A thread that goes through three hundred sections, and writes down which it has left."""

    def run() -> None:
        for n in range(1, 301):
            with gate.section():
                within(n)
                done.append(n)
            time.sleep(0.001)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def own(number: int) -> int:
    return number


def test_nothing_changes_while_it_is_closed() -> None:
    gate, done = Gate(), list[int]()
    thread = train(gate, done)
    assert gate.close(own)
    still = len(done)
    time.sleep(0.05)
    assert len(done) == still
    gate.open()
    thread.join()
    assert done == list(range(1, 301))


def test_a_rank_that_is_behind_is_let_through_to_where_the_others_are() -> None:
    gate, done = Gate(), list[int]()
    train(gate, done)
    assert gate.close(lambda number: number + 3)
    seen: list[int] = []
    gate.open()
    assert gate.close(lambda number: seen.append(number) or number + 1)
    assert len(done) == seen[0] + 1


def test_a_section_under_way_is_waited_for() -> None:
    gate, done, entered = Gate(), list[int](), threading.Event()

    def slow(n: int) -> None:
        entered.set()
        time.sleep(0.1)

    train(gate, done, slow)
    entered.wait()
    assert not gate.close(own, seconds=0.01)
    assert done == []
    assert gate.close(own)
    assert done == [1]


def test_no_state_is_still_that_an_error_has_cut_short() -> None:
    gate = Gate()
    with pytest.raises(ValueError, match="half"), gate.section():
        raise ValueError("half of the weights")
    assert not gate.close(own)


def test_nobody_waits_for_a_training_thread_that_has_ended() -> None:
    gate = Gate()
    with gate.section():
        pass
    gate.end()
    assert gate.close(own)
    gate.open()
    assert not gate.close(lambda number: number + 1)
