"""The order of the data is a fact of the job: not of ranks, not of workers, not of where it was stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.data.loader import Loader
from components.data.rows import RowSource
from tests.components.data.corpus import MIXINGS, interleave, loaders, mixed, run, synthetic

BATCH = 4
STEPS = 12  # more than two epochs of the first source, four of the last
LAST = 6
"""Steps of what is restored everywhere."""
PACKINGS = ("concat", "best_fit", "padded")
SOURCES = [
    *((k, p, m) for k in ("random", "sequential", "ids") for p in PACKINGS for m in MIXINGS),
    *((k, p, "limited") for k in ("mixed", "chat", "instruction", "fim") for p in PACKINGS),
    ("synthetic", "concat", "one"),
]
WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


def digest(steps: Sequence[tuple[Tensor, list[list[int]]]]) -> list[str]:
    """Of each step: its rows in order, and the cursors after it."""
    return [hashlib.sha256(rows.numpy().tobytes() + repr(table).encode()).hexdigest() for rows, table in steps]


def resumed(source: RowSource, state: dict[str, Any], degree: int, workers: int = 0) -> list[Loader]:
    ranks = loaders(source, BATCH, degree, workers)
    for rank in ranks:
        rank.load_state(json.loads(json.dumps(state)))
    return ranks


@pytest.mark.parametrize(("kind", "packing", "mixing"), SOURCES)
def test_restore_at_every_position_on_another_layout(tmp_path: Path, kind: str, packing: str, mixing: str) -> None:
    def source() -> RowSource:
        return mixed(tmp_path, kind, mixing, packing=packing)

    first = loaders(source(), BATCH, 1)
    state, whole = first[0].state_dict([]), digest(list(run(first, STEPS)))
    assert len(set(whole)) == STEPS
    for at in range(STEPS):
        ranks = resumed(source(), state, (1, 2, 4)[at % 3])
        rest = list(run(ranks, STEPS - at))
        assert digest(rest) == whole[at:]
        state = ranks[0].state_dict(rest[0][1])


@pytest.mark.parametrize(("shuffle", "streams"), [(False, 6), (True, 4), (True, 41)])
@pytest.mark.parametrize("kind", ["random", "sequential"])
def test_restore_with_more_streams_than_documents(tmp_path: Path, kind: str, shuffle: bool, streams: int) -> None:
    def source() -> RowSource:
        return mixed(tmp_path, kind, "one", streams=streams, seed=7 if shuffle else None)

    first = loaders(source(), BATCH, 1)
    state, whole = first[0].state_dict([]), digest(list(run(first, STEPS)))
    for at in range(STEPS):
        ranks = resumed(source(), state, (1, 2, 4)[at % 3])
        rest = list(run(ranks, STEPS - at))
        assert digest(rest) == whole[at:]
        state = ranks[0].state_dict(rest[0][1])


def with_workers(folder: Path, kind: str, packing: str, mixing: str, workers: int) -> None:
    def source() -> RowSource:
        return mixed(folder, kind, mixing, packing=packing)

    first = list(run(loaders(source(), BATCH, 1), 9))
    for at, degree in ((0, 1), (4, 2), (7, 4)):
        (loader,) = loaders(source(), BATCH, 1)
        ranks = resumed(source(), loader.state_dict(first[at - 1][1] if at else []), degree, workers)
        assert digest(list(run(ranks, 9 - at))) == digest(first[at:])


@WORKERS
@pytest.mark.parametrize(
    ("kind", "packing", "mixing", "workers"),
    [("random", "best_fit", "tokens", 1), ("mixed", "concat", "limited", 3), ("synthetic", "concat", "one", 3)],
)
def test_workers_change_nothing(tmp_path: Path, kind: str, packing: str, mixing: str, workers: int) -> None:
    with_workers(tmp_path, kind, packing, mixing, workers)


@pytest.mark.slow
@WORKERS
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("kind", "packing", "mixing"), SOURCES)
def test_restore_anywhere(tmp_path: Path, kind: str, packing: str, mixing: str, workers: int) -> None:
    """At every position, on every layout; each restore begins from what another layout has left."""

    def source() -> RowSource:
        return mixed(tmp_path, kind, mixing, packing=packing)

    first = loaders(source(), BATCH, 1)
    state, whole = first[0].state_dict([]), digest(list(run(first, LAST)))
    for at in range(LAST):
        for degree in (1, 2, 4):
            ranks = resumed(source(), state, degree, workers)
            rest = list(run(ranks, LAST - at))
            assert digest(rest) == whole[at:]
        state = ranks[0].state_dict(rest[0][1])


@pytest.mark.parametrize("kind", ["mixed", "synthetic"])
def test_a_run_repeats(tmp_path: Path, kind: str) -> None:
    first, again = (digest(list(run(loaders(mixed(tmp_path, kind, "tokens"), BATCH, 1), 12))) for _ in "ab")
    assert first == again


def test_streams_that_have_not_begun_keep_their_start(tmp_path: Path) -> None:
    (loader,) = loaders(mixed(tmp_path, "random", "one"), BATCH, 1)
    table = next(run([loader], 1))[1]
    assert loader.state_dict(table)["table"][4:] == [[0, 0, 4, 0, 0], [0, 0, 5, 0, 0]]


def test_indexed_rows_go_on_under_another_batch() -> None:
    (four,) = loaders(synthetic(4), 4, 1)
    rows = interleave([torch.cat([x for x, _ in run([four], 6)])])  # rows 0 to 23
    state = four.state_dict(list(run([four], 3))[-1][1])  # 12 rows done
    (six,) = loaders(synthetic(6), 6, 1)
    six.load_state(state)
    assert torch.equal(torch.cat([x for x, _ in run([six], 2)]), rows[12:])
