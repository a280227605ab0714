"""Pipelines compute what one rank computes: loss, norm, validation loss, every gradient, every update."""

from pathlib import Path

import pytest

from tests.components.parallel.pipeline_jobs import Computed, run, same

shows = pytest.mark.shows
PP = "--parallelism.pipeline_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
RECOMPUTE, OPTION = "--activation_checkpoint.mode", "--activation_checkpoint.selective_ac_option"
NAMES = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
SPLITS = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

PLAIN = {
    "untied": (),
    "tied": ("--model.flavor=deep_tied",),
}

PARTS = '[["tok_embeddings"], ["layers.0", "layers.1", "layers.2", "layers.3"], ["layers.4", "norm"], ["output"]]'
GPIPE_V = (
    "0F0,0F1,0F2,0F3,3F0,3F1,3F2,3F3,3B0,3B1,3B2,3B3,0B0,0B1,0B2,0B3",
    "1F0,1F1,1F2,1F3,2F0,2F1,2F2,2F3,2I0,2I1,2W0,2W1,2B2,2B3,1I0,1I1,1I2,1I3,1W0,1W1,1W2,1W3",
)
"""Two ranks, there and back, in an order that torch does not have."""

TWO = {
    **{name: (f"{SCHEDULE}={name}",) for name in NAMES},
    "microbatches of 2": (f"{SCHEDULE}=GPipe", "--parallelism.pipeline_parallel_microbatch_size=2"),
    "one microbatch": (f"{SCHEDULE}=GPipe", "--parallelism.pipeline_parallel_microbatch_size=4"),
    "no accumulation": ("--training.local_batch_size=8",),
    "chunked loss": ("--loss.name=chunked_cross_entropy", "--loss.chunk_tokens=7"),
    "chunked loss, split": (
        "--loss.name=chunked_cross_entropy",
        "--loss.chunk_tokens=7",
        f"{SCHEDULE}=ZBVZeroBubble",
    ),
    "full recompute": (f"{RECOMPUTE}=full", f"{SCHEDULE}=Interleaved1F1B"),
    "recompute by op, split": (f"{RECOMPUTE}=selective", f"{OPTION}=op", f"{SCHEDULE}=ZBVZeroBubble"),
    "full recompute, split": (f"{RECOMPUTE}=full", f"{SCHEDULE}=DualPipeV"),
    "parts by name": (f"--parallelism.module_fqns_per_model_part={PARTS}", f"{SCHEDULE}=LoopedBFS"),
    "a file": ("--parallelism.pipeline_parallel_schedule_csv={folder}/v.csv",),
    "reshard": ("--parallelism.fsdp_reshard_after_forward=always", f"{SCHEDULE}=InterleavedZeroBubble"),
}

SHARD, REPLICATE = "--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"
HALF = ("--training.local_batch_size=2", "--validation.local_batch_size=1")
FOUR = {
    "FSDP": (f"{PP}=2", f"{SHARD}=2", *HALF),
    "DDP": (f"{PP}=2", f"{REPLICATE}=2", *HALF, f"{SCHEDULE}=GPipe"),
    "FSDP, split": (f"{PP}=2", f"{SHARD}=2", "--training.local_batch_size=4", f"{SCHEDULE}=DualPipeV"),
    "offloaded": (f"{PP}=2", f"{SHARD}=2", "--training.enable_cpu_offload", *HALF, f"{SCHEDULE}=ZBVZeroBubble"),
    "four stages": (f"{PP}=4",),
}

TIED = {
    "loop": (f"{SCHEDULE}=Interleaved1F1B",),
    "v": (f"{SCHEDULE}=ZBVZeroBubble",),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Computed]:
    return run(1, tmp_path_factory.mktemp("one"), PLAIN)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Computed]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "v.csv").write_text("\n".join(GPIPE_V) + "\n")
    jobs = {
        name: (f"{PP}=2", *(argument.replace("{folder}", str(folder)) for argument in job)) for name, job in TWO.items()
    }
    return run(2, folder, jobs)


@shows("parallelism.pipeline_parallel_degree")
@pytest.mark.parametrize("name", TWO)
def test_two_stages_or_four_on_two_ranks(name: str, two: dict[str, Computed], reference: dict[str, Computed]) -> None:
    same(two[name], reference["untied"])


@shows("parallelism.pipeline_parallel_schedule")
@shows("parallelism.pipeline_parallel_schedule_csv")
@shows("parallelism.pipeline_parallel_microbatch_size")
def test_the_schedule_is_the_one_that_was_named(two: dict[str, Computed]) -> None:
    assert [two[name].schedules for name in NAMES] == [[(f"Schedule{name}", 4)] for name in NAMES]
    assert two["a file"].schedules == [("_PipelineScheduleRuntime", 4)]
    assert two["microbatches of 2"].schedules == [("ScheduleGPipe", 2)]
    assert two["one microbatch"].schedules == [("ScheduleGPipe", 1)]


def test_tied_embeddings(reference: dict[str, Computed], tmp_path: Path) -> None:
    jobs = {name: (f"{PP}=2", "--model.flavor=deep_tied", *job) for name, job in TIED.items()}
    for found in run(2, tmp_path, jobs).values():
        same(found, reference["tied"])


@pytest.mark.slow
def test_more_ranks_and_data_parallelism(reference: dict[str, Computed], tmp_path: Path) -> None:
    for name, found in run(4, tmp_path, FOUR).items():
        print(name)
        same(found, reference["untied"])
    tied = ("--model.flavor=deep_tied", f"{PP}=2", f"{SHARD}=2", *HALF)
    for found in run(4, tmp_path, {"tied": tied, "tied v": (*tied, f"{SCHEDULE}=ZBVZeroBubble")}).values():
        same(found, reference["tied"])
