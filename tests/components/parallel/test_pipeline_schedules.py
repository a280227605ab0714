"""What schedules ask of a job: exact texts; files of one's own."""

from pathlib import Path

import pytest

from components.config.parallelism import Parallelism
from components.parallel.pipeline_schedules import SCHEDULES, find_schedule, pipeline_problems, read_csv
from components.runtime.errors import ConfigError

PP = "parallelism.pipeline_parallel"
ROWS = "training.local_batch_size"


def problems(rows: int, **keys: object) -> list[str]:
    return list(pipeline_problems(Parallelism(**{"pipeline_parallel_degree": 2, **keys}), rows))  # type: ignore[arg-type]


def test_names_are_torchs() -> None:
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

    for schedule in SCHEDULES.values():
        found = get_schedule_class(schedule.name)
        assert issubclass(found, PipelineScheduleSingle if schedule.shape == "single" else PipelineScheduleMulti)
    assert find_schedule("interleaved1f1b").name == "Interleaved1F1B"


ALLOWED = "GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV"


@pytest.mark.parametrize(
    ("rows", "keys", "line"),
    [
        (
            8,
            {"pipeline_parallel_microbatch_size": 3},
            f"{PP}_microbatch_size = 3: must divide the {ROWS} = 8 rows that the pipeline takes at a time; take 2",
        ),
        (
            4,
            {"pipeline_parallel_degree": 8},
            f'{PP}_schedule = "1F1B": needs at least as many microbatches as there are stages, 8; there are 4 ({ROWS} 4'
            f" // {PP}_microbatch_size 1): set {ROWS} to 8",
        ),
        (
            6,
            {"pipeline_parallel_schedule": "DualPipeV", "pipeline_parallel_microbatch_size": 2},
            f'{PP}_schedule = "DualPipeV": needs at least as many microbatches as there are stages, 4; there are 3'
            f" ({ROWS} 6 // {PP}_microbatch_size 2): set {ROWS} to 8",
        ),
        (
            5,
            {"pipeline_parallel_schedule": "Interleaved1F1B"},
            f'{PP}_schedule = "Interleaved1F1B": goes in 2 rounds (5 // 2 ranks), which must divide the number of'
            f" microbatches; there are 5 ({ROWS} 5 // {PP}_microbatch_size 1): set {ROWS} to 6",
        ),
        (
            4,
            {"pipeline_parallel_schedule": "GPipes"},
            f'{PP}_schedule = "GPipes": no such pipeline schedule; allowed: {ALLOWED}; did you mean GPipe?',
        ),
        (
            4,
            {"pipeline_parallel_schedule": "PipelineScheduleMulti"},
            f'{PP}_schedule = "PipelineScheduleMulti": needs a file; set {PP}_schedule_csv, or take one of {ALLOWED}',
        ),
    ],
)
def test_what_does_not_fit_is_refused(rows: int, keys: dict[str, object], line: str) -> None:
    assert problems(rows, **keys) == [line]


def test_all_is_told_at_once() -> None:
    assert problems(4, pipeline_parallel_schedule="GPipes", pipeline_parallel_microbatch_size=3) == [
        f"{PP}_microbatch_size = 3: must divide the {ROWS} = 4 rows that the pipeline takes at a time; take 2",
        f'{PP}_schedule = "GPipes": no such pipeline schedule; allowed: {ALLOWED}; did you mean GPipe?',
    ]


def test_what_fits_is_not() -> None:
    for name in SCHEDULES:
        assert problems(8, pipeline_parallel_schedule=name) == []
    assert problems(7, pipeline_parallel_degree=1, pipeline_parallel_microbatch_size=3) == []


def write(folder: Path, *rows: str) -> Path:
    path = folder / "s.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_file_tells_ranks_and_microbatches(tmp_path: Path) -> None:
    found = read_csv(
        write(tmp_path, "0F0,0F1,3F0,,(3F1;3I0)OVERLAP_F_B,3B1,3W0,0B0,0B1", "1F0,1F1,2F0,2F1,2B0,2B1,1B0,1B1"), 2
    )
    assert (found.ranks, found.microbatches, found.splits) == ([0, 1, 1, 0], 2, True)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (("0F0,0B0",), "has 1 rows, one for each of 2 pipeline ranks is needed"),
        (
            ("0F0,0B0", "1F0,1X0"),
            "row 2: '1X0' is no action; allowed are stage, one of F B I W, microbatch, such as 0F2, and empty cells",
        ),
        (
            ("0F0,0B0", "2F0,2B0"),
            "every stage from 0 on must be in one row alone, but there are stage 0: row 1; stage 2: row 2",
        ),
        (
            ("0F0,0B0,1F0", "1B0"),
            "every stage from 0 on must be in one row alone, but there are stage 0: row 1; stage 1: row 1, 2",
        ),
        (("0F0,0B0,0B0", "1F0,1B0"), "0B0 is there twice"),
        (("0F0,0B0", "1F0,1I0"), "stage 1 does FI with microbatch 0; it must do F and B, or F, I and W"),
        (("0B0,0F0", "1F0,1B0"), "the ranks would wait for each other for ever: row 1 at 0B0, row 2 at 1F0"),
    ],
)
def test_a_file_that_cannot_run_is_refused(rows: tuple[str, ...], text: str, tmp_path: Path) -> None:
    path = write(tmp_path, *rows)
    with pytest.raises(ConfigError) as error:
        read_csv(path, 2)
    assert str(error.value) == f'{PP}_schedule_csv = "{path}": {text}'


def test_a_file_for_other_microbatches_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "0F0,0B0", "1F0,1B0")
    assert problems(1, pipeline_parallel_schedule_csv=str(path)) == []
    assert problems(2, pipeline_parallel_schedule_csv=str(path)) == [
        f'{PP}_schedule_csv = "{path}": is written for 1 microbatches, but there are 2 ({ROWS} 2 //'
        f" {PP}_microbatch_size 1)"
    ]
    missing = problems(2, pipeline_parallel_schedule_csv=f"{tmp_path}/none.csv")
    assert missing == [
        f'{PP}_schedule_csv = "{tmp_path}/none.csv": cannot be read: [Errno 2] No such file or directory:'
        f" '{tmp_path}/none.csv'"
    ]
