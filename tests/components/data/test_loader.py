"""The loader: states, worker processes, ranks in agreement."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.data.files import open_files
from components.data.loader import Loader
from components.data.order import Place
from components.data.rows import Ending
from components.data.streamed import StreamedRows
from components.mesh.batch import IGNORE
from components.runtime.errors import ConfigError, DataError
from tests.components.data.corpus import SEQ, loaders, run, streamed, synthetic, texts, write_lines
from tests.ranks import run_ranks

DOCUMENTS = texts(23)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "x.jsonl", DOCUMENTS))


def append_long_document(path: str) -> None:
    """One far longer than what its stream's neighbours hold together."""
    with Path(path).open("a") as file:
        file.write('{"text": "' + "x = 1 " * 400 + '"}\n')


def streams_of(
    path: str, ending: Ending = "repeat", streams: int = 4, batch: int = 4, degree: int = 1, **more: Any
) -> list[Loader]:
    return loaders(streamed(open_files(path), streams=streams, ending=ending), batch, degree, **more)


def test_state(path: str) -> None:
    (loader,) = streams_of(path, streams=5)
    table = [[3, 0, 8, 50, 0], [1, 0, 5, 17, 0], [2, 1, 0, 90, 0], [0, 0, 3, 0, 0]]
    assert loader.state_dict(table) == {
        "kind": "streamed",
        "fingerprint": {"streams": 5},
        "streams": 5,
        "table": [*table, [0, 0, 4, 0, 0]],
    }
    assert (loader.streams, loader.rows, loader.global_batch) == (5, 4, 4)


def test_a_state_of_other_data_is_refused(path: str) -> None:
    (loader,) = streams_of(path)
    state = {"kind": "indexed", "fingerprint": {"streams": 5, "seq_len": 9}, "table": []}
    with pytest.raises(DataError) as error:
        loader.load_state(state)
    assert str(error.value) == (
        "the saved loader state belongs to other data: kind was 'indexed', is 'streamed'; seq_len was 9, is None;"
        " streams was 5, is 4; restore these, or start a new job"
    )


def test_a_table_of_the_wrong_size_is_refused(path: str) -> None:
    (loader,) = streams_of(path)
    with pytest.raises(DataError) as error:
        loader.load_state(loader.state_dict([]) | {"table": [[0, 0, 0]]})
    assert str(error.value) == ("the saved loader state has 1 streams, this job 4; set data.streams to that")
    (indexed,) = loaders(synthetic(4), 4, 1)
    with pytest.raises(DataError, match=r"^the saved loader state holds no row number; start from another checkpoint$"):
        indexed.load_state(indexed.state_dict([]) | {"table": []})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 3, "degree": 2}, "a global batch of 3 rows cannot be dealt evenly to 2 data-parallel ranks"),
        (
            {"batch": 6},
            "data.streams = 4: fewer than the global batch of 6 rows; raise it, or set -1",
        ),
        ({"persistent_workers": True}, "dataloader.persistent_workers = True: needs dataloader.num_workers > 0"),
        ({"prefetch_factor": 2}, "dataloader.prefetch_factor = 2: needs dataloader.num_workers > 0"),
    ],
)
def test_settings_that_contradict_each_other(path: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        streams_of(path, **settings)
    assert str(error.value) == message


def test_each_iteration_begins_at_the_loaded_position(path: str) -> None:
    for workers, persistent in ((0, False), (2, False), (2, True)):
        (loader,) = streams_of(path, workers=workers, persistent_workers=persistent)
        first = list(run([loader], 3))
        again = list(run([loader], 3))
        assert torch.equal(first[2][0], again[2][0])
        loader.load_state(loader.state_dict(first[1][1]))
        assert torch.equal(next(run([loader], 1))[0], first[2][0])


def test_persistent_workers_stay_and_others_go(path: str) -> None:
    for persistent in (True, False):
        (loader,) = streams_of(path, "pad", workers=2, persistent_workers=persistent)
        before = set(multiprocessing.active_children())
        pids = []
        for _ in range(2):
            iterator = iter(loader)
            next(iterator)
            pids.append({x.pid for x in set(multiprocessing.active_children()) - before})
            list(iterator)
            del iterator
        assert [len(x) for x in pids] == [2, 2]
        assert (pids[0] == pids[1]) == persistent
        del loader
        assert set(multiprocessing.active_children()) - before == set()


def test_more_workers_than_rows_are_not_started(path: str) -> None:
    (loader,) = streams_of(path, streams=1, batch=1, workers=2)
    before = len(multiprocessing.active_children())
    iterator = iter(loader)
    next(iterator)
    assert len(multiprocessing.active_children()) - before == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_pad_goes_on_until_the_last_stream_ends(path: str, workers: int) -> None:
    append_long_document(path)
    (loader,) = loaders(streamed(open_files(path), streams=3, seed=None, ending="pad"), 3, 1, workers)
    steps = [x for x, _ in run([loader])]
    valid = torch.stack([(x[:, 1] != IGNORE).sum(1) for x in steps])  # (steps, streams)
    assert valid[-1].tolist()[:2] == [0, 0]
    assert 0 < valid[-1, 2] <= SEQ
    assert valid.sum(0).tolist() == [sum(len(x) - 1 for x in _stream(path, s)) for s in range(3)]


def _stream(path: str, stream: int) -> list[list[int]]:
    source = streamed(open_files(path), streams=3, seed=None, ending="pad")
    only = source._sources[0]
    found = [source._encoded(only, x) for x in only.deal.open({stream: Place(0, stream)})[stream]]
    return [x.tokens.tolist() for x in found if x is not None]


def full(path: str, ending: Ending) -> StreamedRows:
    """Rows in which each token is a label."""
    documents = open_files(path)
    return streamed(documents, streams=4, ending=ending, seed=None, cross_document_labels=True)


def counted(path: str, ending: Ending) -> list[int]:
    rank, degree = dist.get_rank(), dist.get_world_size()
    loader = loaders(full(path, ending), 4, degree)[rank]
    return [int((x.batch.labels != IGNORE).sum()) for x in islice(loader.steps(dist.group.WORLD), 200)]


def test_ranks_end_at_the_same_step(path: str) -> None:
    (whole,) = loaders(full(path, "stop"), 4, 1)
    ranks = run_ranks(2, counted, path, "stop")
    assert ranks == [[2 * SEQ] * len(list(whole))] * 2
    append_long_document(path)
    ranks = run_ranks(2, counted, path, "pad")
    (padded,) = loaders(full(path, "pad"), 4, 1)
    assert [sum(x) for x in zip(*ranks, strict=True)] == [int((x[:, 1] != IGNORE).sum()) for x, _ in run([padded])]
    assert (ranks[0][-1], ranks[1][-1] > 0) == (0, True)  # rank 0 waits with padding
    assert run_ranks(2, counted, path, "repeat") == [[2 * SEQ] * 200] * 2


SCRIPT = """
import sys, os, signal, time
from tests.components.data.corpus import loaders, synthetic
(loader,) = loaders(synthetic(4), 4, 1, 2)
steps = iter(loader)
next(steps)
import multiprocessing
workers = [x.pid for x in multiprocessing.active_children()]
print(*workers, flush=True)
{then}
"""


def worker_script(then: str) -> tuple[subprocess.Popen[str], list[int]]:
    command = [sys.executable, "-c", SCRIPT.format(then=then)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(x) for x in process.stdout.readline().split()]


def gone(pids: list[int], seconds: float) -> bool:
    """Whether processes end in time. Zombies whose parent is this machine's init count as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{x}") and "Z" not in _status(x) for x in pids):
            return True
        time.sleep(0.05)
    return False


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("then", ["", "{}['no']"])
def test_workers_end_with_the_process(then: str) -> None:
    process, workers = worker_script(then)
    assert len(workers) == 2
    output, errors = process.communicate(timeout=20)
    assert process.returncode == (1 if then else 0)
    assert (output, errors.count("Error")) == ("", "no" in then)
    assert gone(workers, 1)


def test_workers_leave_signals_to_the_training_process() -> None:
    process, workers = worker_script("time.sleep(0.4)\nfor _ in range(50): next(steps)\nprint('done')")
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=20) == ("done\n", "")
    assert process.returncode == 0
    assert gone(workers, 1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pins where there is an accelerator")
def test_pinning_without_an_accelerator_is_ignored_aloud(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        (loader,) = streams_of(path, pin_memory=True)
    assert caplog.messages == ["dataloader.pin_memory is ignored: this machine has no accelerator"]
    assert not next(iter(loader)).batch.tokens.is_pinned()
