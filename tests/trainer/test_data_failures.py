"""Data that fail in mid-run leave a checkpoint, on all ranks alike, from which the job goes on as if they never had."""

import functools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.components.data.corpus import texts, write_lines
from tests.reliability.interrupted import Ended, Shot, interrupt
from tests.reliability.test_signals import codes, events, saved
from tests.trainer.runs import facts, launch, records

SLOW = pytest.mark.slow
DOCUMENTS = [f"{i} {x}" for i, x in enumerate(texts(200))]
Whole = Callable[[], list[dict[str, float]]]


def corpus(folder: Path, ranks: int) -> Path:
    """A copy for each rank."""
    home = folder / "home"
    for rank in range(ranks):
        (home / str(rank)).mkdir(parents=True, exist_ok=True)
        write_lines(home / str(rank) / "x.jsonl", DOCUMENTS)
    return home


def job(ranks: int, folder: Path, *arguments: str, fails: str = "never 0 0", home: Path | None = None) -> list[Ended]:
    """Six steps of four rows, saved at the end and when data fail."""
    return interrupt(
        ranks,
        folder,
        (
            "--experimental.custom_import=tests.trainer.failing_data",
            "--training.dataset=own_copy",
            f"--training.local_batch_size={4 // ranks}",
            *arguments,
        ),
        DATA_FAILS=fails,
        DATA_FAILED=str(folder / "failed"),
        DATA_HOME=str(home or folder / "home"),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, float]]]:
    """Ranks → what the steps of an undisturbed job come to."""

    @functools.cache
    def run(ranks: int) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp("whole")
        corpus(folder, ranks)
        ended = job(ranks, folder)
        assert codes(ended) == [0] * ranks, ended[0].err
        return [facts(x) for x in records(folder)]

    return run


def goes_on(ranks: int, folder: Path, whole: list[dict[str, float]], *arguments: str) -> None:
    """With its data restored, the job does the rest to the last bit."""
    shutil.rmtree(folder / "home")
    corpus(folder, ranks)
    ended = job(ranks, folder, *arguments)
    assert codes(ended) == [0] * ranks, ended[0].err
    assert [facts(x) for x in records(folder)] == whole
    assert [x["step"] for x in records(folder)] == [1, 2, 3, 4, 5, 6]


VALIDATING = (
    "--training.dataset=c4_test",
    "--validation.enable",
    "--validation.dataset=own_copy",
    "--validation.freq=2",
    "--validation.steps=1",
)
CASES = [
    # ranks, how which rank fails, arguments
    (1, "vanish 9 0", ()),
    (2, "truncate 6 1", ()),
    pytest.param(2, "vanish 6 all", (), marks=SLOW),
    pytest.param(2, "vanish 2 1", VALIDATING, marks=SLOW),
    pytest.param(4, "grow 4 3", (), marks=SLOW),
    pytest.param(2, "truncate 6 1", ("--parallelism.data_parallel_replicate_degree=2",), marks=SLOW),
    pytest.param(2, "bad 7 0", ("--parallelism.tensor_parallel_degree=2", "--model.flavor=deep"), marks=SLOW),
    pytest.param(
        4, "vanish 9 2", ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"), marks=SLOW
    ),
    pytest.param(2, "truncate 9 1", ("--parallelism.context_parallel_degree=2",), marks=SLOW),
    pytest.param(2, "kill 6 1", ("--training.dataloader.num_workers=1",), marks=SLOW),
    pytest.param(2, "truncate 6 0", ("--data.on_end=stop",), marks=SLOW),
    pytest.param(2, "truncate 6 0", ("--checkpoint.interval=1", "--checkpoint.async_mode=async"), marks=SLOW),
]
TOLD = {
    "vanish": "{path}: has vanished while the run read it; restore the file as it was",
    "truncate": "{path}: was truncated from {size} to 100 bytes while the run read it; restore the file as it was",
    "grow": "{path}: grew from {size} to {more} bytes while the run read it; restore the file as it was",
    "bad": "{path}:1:1: no record, says the test; mend the record, or skip",
    "kill": "a loader worker has been killed (",
}


@pytest.mark.parametrize(("ranks", "fails", "arguments"), CASES)
def test_a_failure_ends_in_a_checkpoint(
    ranks: int,
    fails: str,
    arguments: tuple[str, ...],
    whole: Callable[[int], list[dict[str, float]]],
    tmp_path: Path,
) -> None:
    home = corpus(tmp_path, ranks)
    how, _, which = fails.split()
    size = (home / "0" / "x.jsonl").stat().st_size
    ended = job(ranks, tmp_path, *arguments, fails=fails)
    assert codes(ended) == [2] * ranks, ended
    failed = [rank for rank in range(ranks) if "error: " in ended[rank].err]
    assert failed == [int(which)] if which != "all" else failed, ended
    path = home / str(failed[0]) / "x.jsonl"
    told = TOLD[how].format(path=path, size=size, more=size + 3)
    assert ended[failed[0]].err.splitlines()[-1].startswith(f"error: {told}")
    assert not any("Traceback" in x.err for x in ended)
    (last,) = events(tmp_path)[-1:]
    step = last["step"]
    assert last == {"event": "stopped", "step": step, "reason": last["reason"]}
    assert last["reason"].startswith(told) or which == "all"
    assert 1 <= step < 6
    assert saved(tmp_path)[-1] == step
    assert [x["step"] for x in records(tmp_path)] == [*range(1, step + 1)]
    expected = undisturbed(ranks, tmp_path, arguments) if arguments else whole(ranks)
    goes_on(ranks, tmp_path, expected, *arguments)


def undisturbed(ranks: int, folder: Path, arguments: tuple[str, ...]) -> list[dict[str, float]]:
    """What the steps of that layout come to."""
    corpus(folder / "whole", ranks)
    ended = job(ranks, folder / "whole", *arguments)
    assert codes(ended) == [0] * ranks, ended[0].err
    return [facts(x) for x in records(folder / "whole")]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=SLOW)])
def test_a_job_that_fails_in_its_first_step_may_go_on_with_other_data(ranks: int, tmp_path: Path) -> None:
    """Nothing is saved, and all ranks end at once."""
    home = corpus(tmp_path, ranks)
    ended = job(ranks, tmp_path, fails="bad 1 0")
    assert codes(ended) == [2] * ranks, ended
    assert ended[0].err.splitlines()[-1].startswith(f"error: {home}/0/x.jsonl:1:1: no record, says the test; mend")
    assert saved(tmp_path) == []
    for rank in range(ranks):
        write_lines(home / str(rank) / "x.jsonl", [*DOCUMENTS, "one more"])
    assert codes(job(ranks, tmp_path)) == [0] * ranks


@SLOW
def test_weights_that_move_in_backward_are_not_saved(tmp_path: Path) -> None:
    """The other rank has begun a step that cannot end; both end, and soon."""
    home = corpus(tmp_path, 2)
    ended = job(2, tmp_path, "--optimizer.early_step_in_backward", "--training.max_norm=inf", fails="vanish 6 1")
    told = f"error: {home}/1/x.jsonl: has vanished while the run read it; restore the file as it was"
    assert ended[1].err.splitlines()[-1] == told
    assert ended[1].code == 2
    assert ended[0].code in (1, 2)
    assert "nothing is saved" in "".join(x.err for x in ended)
    assert saved(tmp_path) == []


def test_without_checkpoints_the_rank_ends_with_its_error(tmp_path: Path) -> None:
    home = corpus(tmp_path, 1)
    (ended,) = job(1, tmp_path, "--checkpoint.enable=false", fails="vanish 9 0")
    assert ended.code == 2
    told = "has vanished while the run read it; restore the file as it was"
    assert ended.err.splitlines()[-1] == f"error: {home}/0/x.jsonl: {told}"
    assert not (tmp_path / "checkpoint").exists()


def test_skipped_records_are_told_for_each_source(tmp_path: Path) -> None:
    for name, count in (("good", 0), ("poor", 40)):
        lines = ["{", *map(json.dumps, ({"text": x} for x in DOCUMENTS[:3]))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines * count if count else lines[1:] * 40))
    tables = ", ".join(f"{{path='{tmp_path}/{x}.jsonl', name='{x}'}}" for x in ("good", "poor"))
    outcomes = launch(2, tmp_path, f"--data.sources=[{tables}]", "--data.on_bad_record=skip")
    assert [x.code for x in outcomes] == [0, 0], outcomes[0].stderr
    (last,) = (x for x in events(tmp_path) if x["event"] == "skipped_records")
    assert {*last} == {"event", "step", "sources"}
    assert (last["step"], last["sources"]["good"]) == (3, 0)
    count = last["sources"]["poor"]
    assert count > 0
    assert f"records that could not be read and were skipped: {count} (poor {count})" in outcomes[0].stderr


def poor(folder: Path, bad: int) -> Path:
    """A corpus that begins with so many bad records."""
    path = folder / "poor.jsonl"
    path.write_text("\n".join(["{"] * bad + [json.dumps({"text": x}) for x in DOCUMENTS]))
    return path


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW)])
def test_skipped_records_of_validation_are_told_for_each_set(workers: int, tmp_path: Path) -> None:
    """As many as one pass meets, however many passes there were; a set whose records are all bad is told too."""
    (tmp_path / "worse.jsonl").write_text("{\n" * 5)
    tables = ", ".join(f"{{path='{x}'}}" for x in (poor(tmp_path, 3), tmp_path / "worse.jsonl"))
    outcomes = launch(
        2,
        tmp_path,
        "--validation.enable",
        "--validation.freq=1",
        "--validation.steps=-1",
        "--validation.seq_len=64",
        "--validation.local_batch_size=4",
        f"--validation.dataloader.num_workers={workers}",
        f"--validation.sources=[{tables}]",
        "--data.on_bad_record=skip",
    )
    assert [x.code for x in outcomes] == [0, 0], outcomes[0].stderr
    (last,) = (x for x in events(tmp_path) if x["event"] == "skipped_records")
    told = {"poor": 3, "worse": 5}
    assert last == {"event": "skipped_records", "step": 3, "sources": {"": 0}, "validation": told}
    assert "validation records that could not be read and were skipped: 8 (poor 3, worse 5)\n" in outcomes[0].stderr
    assert "\nrecords that could not be read" not in outcomes[0].stderr


@pytest.mark.parametrize("layout", [(), pytest.param(("--parallelism.context_parallel_degree=2",), marks=SLOW)])
def test_skipped_records_are_told_at_a_stop(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Of all ranks, and once of those that read the same rows."""
    data = (f"--training.dataset_path={poor(tmp_path, 8)}", "--data.on_bad_record=skip", "--data.shuffle=false")
    shot = Shot(signal.SIGTERM, (0, 1), ("1.data",))
    ended = interrupt(2, tmp_path, (*data, *layout), [shot], HOLD="data 3 inf 1")
    assert codes(ended) == [75, 75], ended
    stopped = {"event": "stopped", "step": 2, "reason": "SIGTERM"}
    assert events(tmp_path) == [stopped, {"event": "skipped_records", "step": 2, "sources": {"": 8}}]
    assert "records that could not be read and were skipped: 8\n" in ended[0].err
