"""The order of the data is a fact of the job: not of ranks, not of workers, not of where it was stopped."""

import json
from pathlib import Path

import pytest
import torch

from components.data.files import open_files
from components.data.rows import RowSource
from tests.components.data.corpus import interleave, loaders, run, streamed, synthetic, texts, write_lines

KINDS = ("random", "sequential", "synthetic")
BATCH = 4
STEPS = 18  # more than two epochs


def source(kind: str, folder: Path, shuffle: bool, streams: int) -> RowSource:
    if kind == "synthetic":
        return synthetic(BATCH)
    path = write_lines(folder / ("x.jsonl" if kind == "random" else "x.jsonl.gz"), texts(23, 20))
    return streamed(open_files(str(path)), streams=streams, seed=7 if shuffle else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shuffle", "streams"), [(True, 4), (False, 6), (True, 41)])
def test_restore_at_every_position_on_another_layout(tmp_path: Path, kind: str, shuffle: bool, streams: int) -> None:
    whole = list(run(loaders(source(kind, tmp_path, shuffle, streams), BATCH, 1), STEPS))
    state = loaders(source(kind, tmp_path, shuffle, streams), BATCH, 1)[0].state_dict([])
    for at in range(STEPS):
        ranks = loaders(source(kind, tmp_path, shuffle, streams), BATCH, (1, 2, 4)[at % 3])
        for rank in ranks:
            rank.load_state(json.loads(json.dumps(state)))
        rest = list(run(ranks, STEPS - at))
        assert torch.equal(torch.stack([x for x, _ in rest]), torch.stack([x for x, _ in whole[at:]]))
        assert [t for _, t in rest] == [t for _, t in whole[at:]]
        state = ranks[0].state_dict(rest[0][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_change_nothing(tmp_path: Path, kind: str, workers: int) -> None:
    whole = list(run(loaders(source(kind, tmp_path, True, 4), BATCH, 1), 12))
    for at, degree in ((0, 1), (5, 1), (9, 2)):
        ranks = loaders(source(kind, tmp_path, True, 4), BATCH, degree, workers, prefetch_factor=3)
        if at:
            for rank in ranks:
                rank.load_state(rank.state_dict(whole[at - 1][1]))
        rest = list(run(ranks, 12 - at))
        assert torch.equal(torch.stack([x for x, _ in rest]), torch.stack([x for x, _ in whole[at:]]))
        assert [t for _, t in rest] == [t for _, t in whole[at:]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats(tmp_path: Path, kind: str) -> None:
    first, again = (
        torch.stack([x for x, _ in run(loaders(source(kind, tmp_path, True, 4), BATCH, 1), 12)]) for _ in "ab"
    )
    assert torch.equal(first, again)


def test_streams_that_have_not_begun_keep_their_start(tmp_path: Path) -> None:
    (loader,) = loaders(source("random", tmp_path, True, 6), BATCH, 1)
    table = next(run([loader], 1))[1]
    assert loader.state_dict(table)["table"][4:] == [[0, 0, 4, 0], [0, 0, 5, 0]]


def test_indexed_rows_go_on_under_another_batch() -> None:
    (four,) = loaders(synthetic(4), 4, 1)
    rows = interleave([torch.cat([x for x, _ in run([four], 6)])])  # rows 0 to 23
    state = four.state_dict(list(run([four], 3))[-1][1])  # 12 rows done
    (six,) = loaders(synthetic(6), 6, 1)
    six.load_state(state)
    assert torch.equal(torch.cat([x for x, _ in run([six], 2)]), rows[12:])
