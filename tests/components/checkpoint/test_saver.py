"""Saving in the background: what is in such a checkpoint, and what becomes of saves that fail."""

import errno
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from components.checkpoint import contents
from components.checkpoint.boxes import boxes_of
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.ranks import Ranks
from components.checkpoint.saver import Mode, Saver, SaveResult
from components.checkpoint.staging import Stage, stage
from components.runtime.distributed import new_host_group
from components.runtime.errors import CheckpointError, DataError
from tests.components.checkpoint.support import JOB, STATE, loads, same, tensors, zeros
from tests.components.checkpoint.test_checkpoint_ranks import build, full
from tests.ranks import run_ranks

MODES: tuple[Mode, ...] = ("disabled", "async", "async_with_pinned_mem")


def saver(root: Path | str, mode: Mode, most: int = 3) -> Saver:
    group = new_host_group("checkpoint", 30) if dist.is_initialized() else None
    return Saver(Checkpointer(root, keep_latest_k=0, group=group), mode=mode, max_failed_saves=most)


@contextmanager
def held(release: threading.Event) -> Iterator[None]:
    """Saves stop before they write their state, until `release`."""
    real = contents.write_file

    def write(*args: Any) -> Any:
        assert release.wait(20)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "write_file", write)
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    """Saves find no space for their tensors."""

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", write)
        yield


@pytest.mark.parametrize("mode", MODES)
def test_what_changes_after_save_has_returned_is_not_in_the_checkpoint(tmp_path: Path, mode: Mode) -> None:
    run, live, state = saver(tmp_path, mode), tensors(1), {**STATE, "train_state": {"steps": [1]}}
    release = threading.Event()
    if mode == "disabled":
        release.set()
    with held(release):
        run.save(1, live, state, JOB)
        for value in live.values():
            value.fill_(9)
        state["train_state"]["steps"].append(2)
        release.set()
        (result,) = run.finish()
    found = zeros()
    assert Checkpointer(tmp_path, keep_latest_k=0, group=None).load(1, found, job=JOB) == {
        **STATE,
        "train_state": {"steps": [1]},
    }
    assert same(found, tensors(1))
    assert (result.step, result.kind, result.error) == (1, "training", None)
    files = [file for file in (tmp_path / "step-1").iterdir() if file.name != "manifest.json"]
    assert result.bytes == sum(file.stat().st_size for file in files)
    assert 0 < result.stall <= result.seconds
    assert (result.stall == result.seconds) == (mode == "disabled")


def test_memory_is_used_again_and_holds_views_apart() -> None:
    base = torch.arange(12.0)
    live = {"model.a": base[:6].view(2, 3).T, "model.b": base[3:], "model.none": base[:0], "model.n": torch.tensor(3)}
    first = stage(boxes_of(live), pinned=False)
    places = {name: box.data.data_ptr() for name, box in first.items()}
    base += 1
    assert first["model.a"].data.tolist() == [[0, 3], [1, 4], [2, 5]]
    second = stage(boxes_of(live), pinned=False, into=first)
    assert {name: box.data.data_ptr() for name, box in second.items()} == places
    assert {name: box.data.tolist() for name, box in second.items()} == {k: v.tolist() for k, v in live.items()}
    halves = stage(boxes_of(live), pinned=False, into=second, dtype=torch.bfloat16)
    assert [box.data.dtype for box in halves.values()] == [torch.bfloat16] * 3 + [torch.int64]
    assert halves["model.n"].data.data_ptr() == places["model.n"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_weights_alone_in_another_type(tmp_path: Path, mode: Mode) -> None:
    run = saver(tmp_path, mode)
    run.save(4, tensors(2), {}, JOB, kind="model_only", dtype=torch.bfloat16)
    assert [(r.step, r.kind, r.error) for r in run.finish()] == [(4, "model_only", None)]
    found = {n: v.bfloat16() if v.is_floating_point() else v for n, v in zeros().items() if n.startswith("model.")}
    parts = ["optimizer", "lr_scheduler", "dataloader", "train_state", "rng"]
    Checkpointer(tmp_path, keep_latest_k=0, group=None).load(4, found, job=None, exclude=parts)
    wanted = tensors(2)
    assert same(found, {name: wanted[name].to(value.dtype) for name, value in found.items()})


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_weights_that_a_type_cannot_hold_are_not_saved(tmp_path: Path, mode: Mode) -> None:
    run = saver(tmp_path, mode)
    run.save(1, {"model.w": torch.tensor([1.0, -7e4, float("inf")])}, {}, JOB, kind="model_only", dtype=torch.float16)
    cannot = "model.w: float16 cannot hold its largest value, 70000; take another checkpoint.export_dtype"
    assert [r.error for r in run.finish()] == [f"cannot save step-1 in '{tmp_path}': {cannot}"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_failed_saves_are_counted_until_they_are_too_many(
    tmp_path: Path, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "espalier")
    run = saver(tmp_path, mode, most=2)
    errors = {
        step: f"cannot save step-{step} in '{tmp_path}': No space left on device: free space there, or lower "
        "checkpoint.keep_latest_k"
        for step in (2, 4, 5)
    }

    def save(step: int) -> list[SaveResult]:
        run.save(step, tensors(step), STATE, JOB)
        while not (results := run.poll()):
            time.sleep(0.01)
        return results

    assert [r.error for r in save(1)] == [None]
    with full_disk():
        assert [(r.bytes, r.error) for r in save(2)] == [(0, errors[2])]
    assert [r.error for r in save(3)] == [None]  # which ends the row
    with full_disk():
        assert [r.error for r in save(4)] == [errors[4]]
        with pytest.raises(CheckpointError) as caught:
            save(5)
    assert (
        str(caught.value) == f"checkpoint.max_failed_saves = 2: the last 2 saves have failed: {errors[4]}; {errors[5]}"
    )
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]
    assert loads(tmp_path, 1)
    assert loads(tmp_path, 3)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [
        f"{errors[step]}; earlier checkpoints are as they were; {count} of 2 failed saves in a row"
        " (checkpoint.max_failed_saves)"
        for step, count in ((2, 1), (4, 1), (5, 2))
    ]
    saved = [r.getMessage() for r in caplog.records if r.getMessage().startswith("saved step-")]
    assert [text.split(":")[0] for text in saved] == ["saved step-1", "saved step-3"]
    assert all(" MB in " in text and ", training waited " in text for text in saved)


def test_what_is_saved_only_to_be_exported_does_not_end_a_row_of_failures(tmp_path: Path) -> None:
    """It is no checkpoint: a job whose checkpoints all fail stops, however well its exports go."""
    run = saver(tmp_path / "checkpoint", "disabled", most=2)
    beside = Checkpointer(tmp_path / "export", keep_latest_k=0, group=None)
    with full_disk():
        run.save(2, tensors(2), STATE, JOB)
    run.save(3, tensors(3), {}, JOB, kind="model_only", through=beside)
    assert [r.error is None for r in run.poll()] == [False, True]
    with full_disk():
        run.save(4, tensors(4), STATE, JOB)
    with pytest.raises(CheckpointError, match=r"^checkpoint\.max_failed_saves = 2: the last 2 saves have failed: "):
        run.poll()


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    run, release = saver(tmp_path, "async"), threading.Event()
    with held(release):
        run.save(1, tensors(1), STATE, JOB)
        assert run.poll() == []
        threading.Timer(0.3, release.set).start()
        run.save(2, tensors(2), STATE, JOB)
    first, second = run.finish()
    assert (first.step, second.step) == (1, 2)
    assert first.stall < 0.2 < 0.25 < second.stall < second.seconds
    assert run.finish() == run.poll() == []
    assert loads(tmp_path, 1)
    assert loads(tmp_path, 2)


def test_failures_that_finish_has_told_of_count_at_the_next_poll(tmp_path: Path) -> None:
    run = saver(tmp_path, "async", most=2)
    with full_disk():
        run.save(1, tensors(1), STATE, JOB)
        run.save(2, tensors(2), STATE, JOB)
        run.wait()
    assert [r.error is None for r in run.finish()] == [False, False]
    with pytest.raises(CheckpointError, match=r"^checkpoint\.max_failed_saves = 2: the last 2 saves have failed: "):
        run.poll()


@pytest.mark.parametrize(("error", "ended"), [(DataError("a.jsonl:1"), True), (RuntimeError("gloo: rank 1"), False)])
def test_an_error_lets_the_save_under_way_end(tmp_path: Path, error: Exception, ended: bool) -> None:
    run, release = saver(tmp_path, "async"), threading.Event()
    with held(release):
        run.save(1, tensors(1), STATE, JOB)
        threading.Timer(0.2, release.set).start()
        with pytest.raises(type(error)), run.unbroken():
            raise error
        assert (tmp_path / "step-1").exists() == ended
        assert [r.error for r in run.finish()] == [None]


def test_weights_alone_in_between_cost_no_new_memory() -> None:
    memory = Stage(Ranks(None), pinned=False)

    def places(named: dict[str, Tensor]) -> dict[str, int]:
        return {name: box.data.data_ptr() for name, box in memory.take(named, None, None, "cannot save").items()}

    first = places(tensors(1))
    weights = {name: value for name, value in tensors(1).items() if name.startswith("model.")}
    assert places(weights) == {name: first[name] for name in weights}
    assert places(tensors(2)) == first


def test_state_is_asked_for_once_nothing_else_is_saved(tmp_path: Path) -> None:
    run, release, asked = saver(tmp_path / "a", "async"), threading.Event(), []

    def state() -> dict[str, Any]:
        asked.append(release.is_set())
        return STATE

    other = Checkpointer(tmp_path / "b", keep_latest_k=0, group=None)
    with held(release):
        run.save(1, tensors(1), STATE, JOB)
        threading.Timer(0.1, release.set).start()
        run.save(2, tensors(2), state, JOB, through=other)
    assert [r.error for r in run.finish()] == [None, None]
    assert asked == [True]
    assert loads(tmp_path / "a", 1)
    assert loads(tmp_path / "b", 2)


def test_what_follows_a_save(tmp_path: Path) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def export(folder: Any) -> None:
        apart = threading.current_thread() is not threading.main_thread()
        seen.append((folder.name, "manifest.json" in folder.names(), apart))
        if folder.name == "step-2":
            raise CheckpointError("cannot export step-2")

    run = saver(tmp_path, "async")
    run.save(1, tensors(1), STATE, JOB, then=export)
    run.save(2, tensors(2), STATE, JOB, then=export)
    run.save(3, tensors(3), STATE, JOB, then=export, wait=True)
    assert [r.error for r in run.finish()] == [None, "cannot export step-2", None]
    assert seen == [("step-1", True, True), ("step-2", True, True), ("step-3", True, False)]


def test_another_thread_saves_without_touching_what_the_training_thread_is_told(tmp_path: Path) -> None:
    run, told = saver(tmp_path, "async"), []
    run.save(1, tensors(1), STATE, JOB)

    def interrupt() -> None:
        told.extend(run.finish())
        run.save(2, tensors(2), STATE, JOB)
        told.extend(run.finish())

    other = threading.Thread(target=interrupt)
    other.start()
    other.join()
    assert [r.step for r in told] == [1, 2]
    assert [r.step for r in run.poll()] == [1]
    assert run.poll() == []


def save_each(root: str) -> list[dict[str, list]]:
    """The same state by each mode; what was saved."""
    for mode in MODES:
        run = saver(f"{root}/{mode}", mode)
        for step in (1, 2):
            run.save(step, build(step), STATE, JOB)
        assert [r.error for r in run.finish()] == [None, None]
    return [full(build(step)) for step in (1, 2)]


def load_each(root: str) -> list[list[dict[str, list]]]:
    found = []
    for mode in MODES:
        run = Checkpointer(f"{root}/{mode}", keep_latest_k=0, group=None)
        found.append([])
        for step in (1, 2):
            tensors = build(99)
            assert run.load(step, tensors, job=JOB) == STATE
            found[-1].append(full(tensors))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_mode_saves_the_same(tmp_path: Path, ranks: int) -> None:
    root = str(tmp_path)
    saved = run_ranks(ranks, save_each, root)[0] if ranks > 1 else save_each(root)
    assert load_each(root) == [saved] * 3


def copied(replicated: dict[str, Tensor]) -> list[Any]:
    """Names and bytes that this rank copies of replicated and of sharded tensors, twice."""
    stage = Stage(Ranks(dist.group.WORLD), pinned=False)
    twice = [stage.take(replicated, None, None, "cannot save") for _ in range(2)]
    sharded = stage.take(build(1), None, None, "cannot save")
    return [*(sorted(boxes) for boxes in twice), sum(b.data.nbytes for b in sharded.values())]


def test_of_copies_on_several_ranks_only_one_is_staged() -> None:
    replicated = {f"model.{size}": torch.zeros(size) for size in (4, 3, 2, 1)}
    (first, second, _), (third, fourth, _) = found = run_ranks(2, copied, replicated)
    assert (first, third) == (second, fourth) == (["model.1", "model.4"], ["model.2", "model.3"])
    assert sum(size for *_, size in found) == sum(4 * len(torch.tensor(v).view(-1)) for v in full(build(1)).values())


def fails_on_one(root: str, mode: Mode) -> list[Any]:
    """Rank 1 has no space for the second and all later saves; what the ranks are told of it, and at which poll."""
    run, told = saver(root, mode, most=2), []
    for step in range(1, 5):
        with full_disk() if dist.get_rank() and step > 1 else pytest.MonkeyPatch.context():
            run.save(step, build(step), STATE, JOB)
            for poll in range(400):
                try:
                    results = run.poll()
                except CheckpointError as error:
                    return [*told, str(error)]
                if results:
                    told.append([(r.step, r.bytes > 0, r.error) for r in results])
                    break
                time.sleep(0.01 * (poll % 2))
    return told


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_is_full_on_one_rank_fails_on_all_alike(tmp_path: Path, mode: Mode) -> None:
    first, second = run_ranks(2, fails_on_one, str(tmp_path), mode)
    full = "rank 1: No space left on device: free space there, or lower checkpoint.keep_latest_k"
    errors = [f"cannot save step-{step} in '{tmp_path}': {full}" for step in (2, 3)]
    assert first == second
    assert first == [
        [(1, True, None)],
        [(2, False, errors[0])],
        f"checkpoint.max_failed_saves = 2: the last 2 saves have failed: {errors[0]}; {errors[1]}",
    ]
    assert os.listdir(tmp_path) == ["step-1"]


def on_a_small_disk(root: str, mode: Mode) -> list[str | None]:
    """Files may not grow beyond 64 KiB during the second and third of five saves; the errors of all."""
    run, errors = saver(root, mode), []
    big = {"model.w": torch.arange(50_000.0), "optimizer.w.exp_avg": torch.ones(50_000)}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 6):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, unlimited[1]) if step in (2, 3) else unlimited)
        run.save(step, big, STATE, JOB)
        errors += [r.error for r in run.finish()]
        assert run.poll() == []
    return errors


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, mode: Mode) -> None:
    (errors,) = run_ranks(1, on_a_small_disk, str(tmp_path), mode)
    mend = "free space there, or lower checkpoint.keep_latest_k"
    texts = [f"cannot save step-{step} in '{tmp_path}': File too large: {mend}" for step in (2, 3)]
    assert errors == [None, *texts, None, None]
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-4", "step-5"]
    for step in (1, 4, 5):
        found = {"model.w": torch.zeros(50_000), "optimizer.w.exp_avg": torch.zeros(50_000)}
        Checkpointer(tmp_path, keep_latest_k=0, group=None).load(step, found, job=JOB)
        assert torch.equal(found["model.w"], torch.arange(50_000.0))


def slow_on_one(root: str) -> list[list[int]]:
    """Steps with results at each poll, where rank 1 ends its save only after the fifth."""
    run, release, told = saver(root, "async"), threading.Event(), []

    def export(_: Any) -> None:
        assert not dist.get_rank() or release.wait(20)

    run.save(1, build(1), STATE, JOB, then=export)
    while not dist.get_rank() and run._latest and run._latest.thread and run._latest.thread.is_alive():
        time.sleep(0.01)
    for poll in range(200):
        if poll == 5:
            release.set()
        told.append([r.step for r in run.poll()])
        if told[-1]:
            return told
        time.sleep(0.01)
    return told


def test_all_ranks_are_told_at_the_same_poll(tmp_path: Path) -> None:
    first, second = run_ranks(2, slow_on_one, str(tmp_path))
    assert first == second
    assert first[:5] == [[]] * 5
    assert first[-1] == [1]


def error_of(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except CheckpointError as error:
        return str(error)
    return "nothing went wrong"


def breaks_on_one(root: str) -> str:
    """Rank 1's save loses its communication after the commit."""
    run = saver(root, "async")

    def lose(_: Any) -> None:
        if dist.get_rank():
            raise RuntimeError("Connection closed by peer")

    run.save(1, build(1), STATE, JOB, then=lose)
    return error_of(run.finish)


def test_ranks_that_can_no_longer_save_together_stop(tmp_path: Path) -> None:
    found = run_ranks(2, breaks_on_one, str(tmp_path))
    assert found == [f"cannot save step-1 in '{tmp_path}': rank 1: RuntimeError: Connection closed by peer"] * 2
