"""What `[training]`, `[data]`, `[optimizer]` and `[validation]` do: small jobs that differ in one key."""

import gzip
import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.training import DataLoader, Training, Validation
from components.data.build import build_loader
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.runtime.errors import ConfigError
from models.llama3.args import FLAVORS
from models.train_spec import families
from tests.keys.jobs import Done, makers, run_jobs
from tests.ranks import run_ranks
from tests.trainer.runs import ROOT
from trainer.build import build_stages
from trainer.config.load import load_job

shows = pytest.mark.shows
MINE = ("--training.dataset=mine", "--training.dataset_path={folder}/mine.jsonl")
PACKED = ("--training.dataset=mine", "--training.dataset_path={folder}/mine.jsonl.gz")
BROKEN = ("--training.dataset=mine", "--training.dataset_path={folder}/broken.jsonl", "--data.shuffle=false")
SHORT = ("--training.dataset=mine", "--training.dataset_path={folder}/short.jsonl")
EXPLODING = "--optimizer.lr=1e38"
JOBS = {
    "plain": (),
    "dataset": ("--training.dataset=synthetic",),
    "dataset_path": MINE,
    "local_batch_size": ("--training.local_batch_size=4",),
    "global_batch_size": ("--training.global_batch_size=6",),
    "seq_len": ("--training.seq_len=20",),
    "max_norm": ("--training.max_norm=1e-3",),
    "steps": ("--training.steps=2",),
    "dtype": ("--training.dtype=bfloat16",),
    "mixed_precision_param": ("--training.mixed_precision_param=bfloat16",),
    "gc_freq": ("--training.gc_freq=1",),
    "gc_debug": ("--training.gc_debug",),
    "on_nonfinite stop": (EXPLODING,),
    "on_nonfinite skip": (EXPLODING, "--training.on_nonfinite=skip"),
    "streams": (*MINE, "--data.streams=9"),
    "shuffle": ("--data.shuffle=false",),
    "shuffle_window 2": (*PACKED, "--data.shuffle_window=2"),
    "shuffle_window 9": (*PACKED, "--data.shuffle_window=9"),
    "on_end repeat": SHORT,
    "on_end stop": (*SHORT, "--data.on_end=stop"),
    "on_bad_record error": BROKEN,
    "on_bad_record skip": (*BROKEN, "--data.on_bad_record=skip"),
    "text_field": (*MINE, "--data.text_field=other"),
    "add_bos": (*MINE, "--data.add_bos=false"),
    "add_eos": (*MINE, "--data.add_eos=false"),
    "document_mask": (*MINE, "--data.document_mask"),
    "name": ("--optimizer.name=Adam",),
    "lr": ("--optimizer.lr=1e-3",),
    "beta1": ("--optimizer.beta1=0.5",),
    "beta2": ("--optimizer.beta2=0.5",),
    "eps": ("--optimizer.eps=1e-2",),
    "weight_decay": ("--optimizer.weight_decay=0.5",),
    "parameter_groups": ("--optimizer.parameter_groups=[{ pattern = 'norm', lr_factor = 0 }]",),
}


def write_data(folder: Path) -> None:
    lines = (ROOT / "tests/assets/c4_test/part-1.jsonl").read_text().splitlines()[:30]
    texts = [json.loads(line)["text"][:120] for line in lines]  # some forty tokens
    mine = "".join(json.dumps({"text": text, "other": text[::-1]}) + "\n" for text in texts)
    (folder / "mine.jsonl").write_text(mine)
    (folder / "mine.jsonl.gz").write_bytes(gzip.compress(mine.encode(), mtime=0))
    (folder / "broken.jsonl").write_text("\n".join([*mine.splitlines()[:5], '{"text": "cut', *mine.splitlines()[5:]]))
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": text[:100]}) + "\n" for text in texts[:4]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("jobs")
    write_data(folder)
    return run_jobs(folder, JOBS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("plain", "dataset", marks=shows("training.dataset")),
        pytest.param("plain", "dataset_path", marks=shows("training.dataset_path")),
        pytest.param("plain", "dtype", marks=shows("training.dtype")),
        pytest.param("plain", "mixed_precision_param", marks=shows("training.mixed_precision_param")),
        pytest.param("plain", "shuffle", marks=shows("data.shuffle")),
        pytest.param("dataset_path", "add_bos", marks=shows("data.add_bos")),
        pytest.param("dataset_path", "text_field", marks=shows("data.text_field")),
        pytest.param("shuffle_window 2", "shuffle_window 9", marks=shows("data.shuffle_window")),
    ],
)
def test_another_first_loss(done: dict[str, Done], one: str, other: str) -> None:
    assert done[one].column("loss")[0] != done[other].column("loss")[0]


@pytest.mark.parametrize(
    ("other", "from_step"),
    [
        pytest.param("max_norm", 2, marks=shows("training.max_norm")),
        pytest.param("name", 2, marks=shows("optimizer.name")),
        pytest.param("lr", 2, marks=shows("optimizer.lr")),
        pytest.param("beta1", 3, marks=shows("optimizer.beta1")),  # the first step is the same for any beta
        pytest.param("beta2", 3, marks=shows("optimizer.beta2")),
        pytest.param("eps", 2, marks=shows("optimizer.eps")),
        pytest.param("weight_decay", 2, marks=shows("optimizer.weight_decay")),
        pytest.param("parameter_groups", 2, marks=shows("optimizer.parameter_groups")),
    ],
)
def test_another_way_down(done: dict[str, Done], other: str, from_step: int) -> None:
    pairs = zip(done["plain"].column("loss"), done[other].column("loss"), strict=True)
    assert [step for step, (a, b) in enumerate(pairs, start=1) if a != b] == list(range(from_step, 4))


@shows("data.streams", "data.add_eos")
def test_another_loss_once_documents_end(done: dict[str, Done]) -> None:
    first, second, third = zip(
        *(done[name].column("loss") for name in ("dataset_path", "streams", "add_eos")), strict=True
    )
    assert (len(set(first)), len(set(second)), len(set(third))) == (1, 3, 3)


@shows("optimizer.lr")
def test_learning_rate(done: dict[str, Done]) -> None:
    assert done["plain"].column("lr") == pytest.approx([4e-4, 8e-4, 8e-4])
    assert done["lr"].column("lr") == pytest.approx([5e-4, 1e-3, 1e-3])


@shows("training.global_batch_size", "training.seq_len", "training.steps", "data.document_mask")
def test_tokens(done: dict[str, Done]) -> None:
    assert done["plain"].column("tokens") == [4 * 24, 2 * 4 * 24, 3 * 4 * 24]
    assert done["global_batch_size"].column("tokens") == [6 * 24, 2 * 6 * 24, 3 * 6 * 24]
    assert done["seq_len"].column("tokens") == [4 * 20, 2 * 4 * 20, 3 * 4 * 20]
    assert done["steps"].column("tokens") == [4 * 24, 2 * 4 * 24]
    assert done["dataset_path"].column("tokens")[-1] == 3 * 4 * 24 - 4  # the last token of a document has no label
    assert done["document_mask"].column("tokens") == done["dataset_path"].column("tokens")
    assert done["document_mask"].column("loss") != done["dataset_path"].column("loss")


@shows("training.local_batch_size")
def test_local_batch_size(done: dict[str, Done]) -> None:
    layout = "layout: 1 × cpu, 1 replicated × 1 sharded; 4 rows of 24 tokens a step, "
    assert f"{layout}2 × 2 on each rank" in done["plain"].log
    assert f"{layout}1 × 4 on each rank" in done["local_batch_size"].log
    assert done["local_batch_size"].column("loss") == pytest.approx(done["plain"].column("loss"), rel=1e-5)


@shows("training.mixed_precision_reduce")
def test_reduction_has_one_type() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(["--training.mixed_precision_reduce=bfloat16"], {})
    assert str(caught.value) == '--training.mixed_precision_reduce=bfloat16: must be "float32"'


@shows("training.gc_debug")
def test_garbage_collection(done: dict[str, Done]) -> None:
    assert [done[name].log.count("garbage at step ") for name in ("plain", "gc_freq", "gc_debug")] == [0, 0, 3]


@shows("training.on_nonfinite")
def test_on_nonfinite(done: dict[str, Done]) -> None:
    stopped, skipped = done["on_nonfinite stop"], done["on_nonfinite skip"]
    assert stopped.outcome.code == 1
    assert "error: not finite before the optimizer step, weights are unchanged: step 2" in stopped.outcome.stderr
    assert [(event["event"], event["step"]) for event in skipped.events] == [("skipped_step", 2), ("skipped_step", 3)]
    assert len(skipped.steps) == 3


@shows("data.on_end")
def test_on_end(done: dict[str, Done]) -> None:
    assert len(done["on_end repeat"].steps) == 3
    assert len(done["on_end stop"].steps) == 1
    assert "\nthe data ended after step 1 of 3\n" in done["on_end stop"].log


@shows("data.on_bad_record")
def test_on_bad_record(done: dict[str, Done]) -> None:
    stopped, skipped = done["on_bad_record error"], done["on_bad_record skip"]
    assert stopped.outcome.code == 2
    assert "broken.jsonl:6:10: truncated JSON (Unterminated string starting at)" in stopped.outcome.stderr
    assert "records that could not be read and were skipped: 1\n" in skipped.log
    assert "skipped" not in done["plain"].log


def offloaded(offload: bool) -> str:
    """Where the parameters are of a model that is built for the meta device."""
    training = Training(seq_len=24, enable_cpu_offload=offload)
    spec, args, job = (
        families["llama3"].load(),
        replace(FLAVORS["debugmodel"], n_layers=1),
        JobConfig(training=training),
    )
    dims = ParallelDims.build(Degrees(), "cpu")
    model = build_stages(spec, args, job, dims, torch.device("meta"), torch.float32, 0)[0].module
    return next(model.parameters()).device.type


@shows("training.enable_cpu_offload")
def test_offload() -> None:
    assert run_ranks(1, offloaded, False) + run_ranks(1, offloaded, True) == ["meta", "cpu"]


def rows_made(cases: list[tuple[JobConfig, Path, int]]) -> list[list[int]]:
    """For each job: the rows that each process has made when one step is there and nothing more is under way."""
    importlib.import_module("tests.keys.recording")
    found = []
    for job, file, wanted in cases:
        data: dict[str, Any] = {"tokenizer": None, "data_rank": 0, "data_degree": 1, "vocab_size": 50}
        steps = iter(build_loader(job, validation=job.validation.enable, **data))
        next(steps)
        deadline = time.monotonic() + 10
        while makers(file).total() < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # whatever else may come
        found.append(sorted(makers(file).values()))
    return found


@shows(
    "training.dataloader.num_workers", "training.dataloader.prefetch_factor", "validation.dataloader.prefetch_factor"
)
def test_workers_and_prefetching(tmp_path: Path) -> None:
    """Each worker prepares so many steps, two if it is not told, and one for the step that was taken."""
    loaders = [
        DataLoader(),
        DataLoader(num_workers=1),
        DataLoader(num_workers=2),
        DataLoader(num_workers=1, prefetch_factor=5),
    ]
    rows: list[dict[str, Any]] = [
        {"dataset": "recording", "dataset_path": str(tmp_path / str(i)), "seq_len": 8} for i in range(6)
    ]
    jobs = [
        JobConfig(training=Training(**row, global_batch_size=4, dataloader=loader))
        for row, loader in zip(rows, loaders, strict=False)
    ]
    loaders = [DataLoader(num_workers=1), DataLoader(num_workers=1, prefetch_factor=4)]
    jobs += [
        JobConfig(validation=Validation(enable=True, **row, global_batch_size=2, dataloader=loader))
        for row, loader in zip(rows[4:], loaders, strict=True)
    ]
    made = [[4], [4 * 3], [2 * 3, 2 * 3], [4 * 6], [2 * 3], [2 * 5]]
    cases = [(job, tmp_path / str(i), sum(made[i])) for i, job in enumerate(jobs)]
    assert run_ranks(1, rows_made, cases, backend=None) == [made]


VALIDATED = (
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=20",
    "--validation.local_batch_size=2",
    "--validation.global_batch_size=4",
    "--validation.steps=1",
    "--validation.freq=2",
)
RECORDED = (*VALIDATED, "--validation.dataset=recording", "--validation.freq=1", "--validation.steps=-1")
VALIDATIONS = {
    "off": VALIDATED[1:],
    "on": VALIDATED,
    "dataset": (*VALIDATED, "--validation.dataset=synthetic"),
    "dataset_path": (*VALIDATED, "--validation.dataset=mine", "--validation.dataset_path={folder}/mine.jsonl"),
    "seq_len": (*VALIDATED, "--validation.seq_len=16"),
    "global_batch_size": (*VALIDATED, "--validation.global_batch_size=2"),
    "local_batch_size": (*VALIDATED, "--validation.global_batch_size=-1"),
    "freq": (*VALIDATED, "--validation.freq=1"),
    "steps": (*VALIDATED, "--validation.steps=2"),
    "no workers": (*RECORDED, "--validation.dataset_path={folder}/rows of no workers"),
    "workers": (
        *RECORDED,
        "--validation.dataset_path={folder}/rows of workers",
        "--validation.dataloader.num_workers=2",
    ),
    "persistent": (
        *RECORDED,
        "--validation.dataset_path={folder}/rows of persistent",
        "--validation.dataloader.num_workers=2",
        "--validation.dataloader.persistent_workers",
    ),
    "pinned training": (*VALIDATED, "--training.dataloader.pin_memory"),
    "pinned validation": (*VALIDATED, "--validation.dataloader.pin_memory"),
}


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("validations")
    write_data(folder)
    return run_jobs(folder, VALIDATIONS)


@shows("validation.enable", "validation.freq")
def test_when_validation_runs(validated: dict[str, Done]) -> None:
    def when(name: str) -> list[int]:
        return [record["step"] for record in validated[name].steps if "validation_loss" in record]

    assert {name: when(name) for name in ("off", "on", "freq")} == {"off": [], "on": [2, 3], "freq": [1, 2, 3]}
    losses = [[record["loss"] for record in validated[name].steps] for name in ("off", "on", "freq")]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dataset", marks=shows("validation.dataset")),
        pytest.param("dataset_path", marks=shows("validation.dataset_path")),
        pytest.param("seq_len", marks=shows("validation.seq_len")),
        pytest.param("global_batch_size", marks=shows("validation.global_batch_size")),
        pytest.param("steps", marks=shows("validation.steps")),
    ],
)
def test_other_rows_are_judged(validated: dict[str, Done], name: str) -> None:
    assert validated[name].steps[-1]["validation_loss"] != validated["on"].steps[-1]["validation_loss"]


@shows("validation.local_batch_size")
def test_validation_batch_follows_the_local_one(validated: dict[str, Done]) -> None:
    two = validated["global_batch_size"].steps[-1]["validation_loss"]
    assert validated["local_batch_size"].steps[-1]["validation_loss"] == two
    assert validated["on"].steps[-1]["validation_loss"] != two


@shows("validation.dataloader.num_workers", "validation.dataloader.persistent_workers")
def test_who_makes_validation_rows(validated: dict[str, Done]) -> None:
    processes = {}
    for name in ("no workers", "workers", "persistent"):
        assert len(validated[name].steps) == 3
        made = makers(validated[name].folder.parent / f"rows of {name}")
        assert made.total() == 3 * 12  # three validations of twelve rows
        processes[name] = len(made)
    assert processes == {"no workers": 1, "workers": 3 * 2, "persistent": 2}


@shows("training.dataloader.pin_memory", "validation.dataloader.pin_memory")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator pins")
def test_memory_cannot_be_pinned_for_nobody(validated: dict[str, Done]) -> None:
    note = "dataloader.pin_memory is ignored: this machine has no accelerator\n"
    names = ("on", "pinned training", "pinned validation")
    assert [validated[name].log.count(note) for name in names] == [0, 1, 1]
