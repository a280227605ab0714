"""A job that was cut off comes back: bit for bit on the same layout, with the same numbers on any other."""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.manifest import Manifest
from components.runtime.errors import CheckpointError
from tests.trainer.runs import facts, launch, records, train
from trainer.persistence import Persistence, Source

SAVING = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=6", "--data.document_mask")


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read without knowing the model."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = folder / "all.pt"
    dcp_to_torch_save(folder / f"checkpoint/step-{step}", target)
    return torch.load(target, weights_only=True)


def cut_off(folder: Path, after: int) -> None:
    """Leave the folder as if the job had been killed after saving step `after`, later steps already reported."""
    for step in Checkpointer(folder / "checkpoint", keep_latest_k=0, group=None).steps():
        if step > after:
            shutil.rmtree(folder / f"checkpoint/step-{step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(2, folder, *SAVING)
    return folder


def copy(whole: Path, folder: Path, after: int) -> Path:
    shutil.copytree(whole, folder)
    cut_off(folder, after)
    return folder


@pytest.mark.parametrize("after", [2, 4])
def test_the_same_layout_goes_on_bit_for_bit(after: int, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "run", after)
    resumed = train(2, folder, *SAVING)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]  # repeated steps are not there twice
    assert [facts(record) for record in resumed] == [facts(record) for record in records(whole)]
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {2: [("saved", 2), ("resume", 2), ("saved", 4), ("saved", 6)]}
    told[4] = [("saved", 2), ("saved", 4), ("resume", 4), ("saved", 6)]
    assert [(e["event"], e["step"]) for e in events if "event" in e] == told[after]
    want, got = tensors(whole, 6), tensors(folder, 6)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (1, ("--training.local_batch_size=4",)),
        (4, ("--parallelism.data_parallel_replicate_degree=2", "--training.dataloader.num_workers=2")),
    ],
    ids=["1 rank", "HSDP and workers"],
)
def test_another_layout_goes_on_with_the_same_numbers(
    ranks: int, arguments: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    folder = copy(whole, tmp_path / "run", 2)
    resumed = train(ranks, folder, *SAVING, *arguments)
    for mine, theirs in zip(resumed, records(whole), strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)


def test_a_derived_global_batch_stays_what_it_was(tmp_path: Path) -> None:
    derived = (*SAVING, "--training.global_batch_size=-1", "--training.local_batch_size=2", "--training.steps=2")
    train(2, tmp_path, *derived)
    (outcome,) = launch(1, tmp_path, *derived, "--training.steps=3")
    assert outcome.code == 0
    assert "training.global_batch_size = -1: 4 rows, kept from the checkpoint" in outcome.stderr
    assert [record["tokens"] for record in records(tmp_path)][-1] > 2 * 4 * 24 * 0.8
    (outcome,) = launch(1, tmp_path, *derived, "--training.steps=4", "--training.local_batch_size=3")
    assert outcome.code == 2
    assert outcome.stderr.endswith(
        "error: training.global_batch_size = 4, as saved, is no multiple of local_batch_size 3 × 1 data-parallel ranks:"
        " choose a training.local_batch_size that divides 4\n"
    )


def test_a_derived_validation_batch_is_told_and_stays_what_it_was(tmp_path: Path) -> None:
    judged = ("--validation.enable", "--validation.dataset=c4_test", "--validation.seq_len=20", "--validation.steps=2")
    common = (*SAVING, *judged, "--validation.local_batch_size=2", "--validation.freq=2")
    (outcome,) = launch(1, tmp_path, *common, "--training.steps=2")
    assert (
        "note: validation.global_batch_size = -1: 2 rows (2 local × 1 data-parallel); it follows the layout: set it to"
        " 2 for the same results on any"
    ) in outcome.stderr
    outcome, _ = launch(2, tmp_path, *common, "--training.steps=4", "--validation.local_batch_size=1")
    assert "note: validation.global_batch_size = -1: 2 rows, kept from the checkpoint" in outcome.stderr
    whole = train(1, tmp_path / "whole", *common, "--training.steps=4", "--lr_scheduler.total_steps=2")
    assert records(tmp_path)[1]["validation_loss"] == whole[1]["validation_loss"]


def test_another_course_from_an_earlier_step_does_not_mix_with_the_first(whole: Path, tmp_path: Path) -> None:
    """With other `training.steps` the learning rate falls differently, so later checkpoints are of another course."""
    folder = copy(whole, tmp_path / "run", 6)
    arguments = (*SAVING, "--training.steps=8")
    outcomes = launch(2, folder, *arguments, "--checkpoint.load_step=2")
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "going on from step-2: step-4 is of an earlier course, now 'step-4.superseded-" in outcomes[0].stderr
    names = sorted(path.name.split("-", 2)[1] for path in (folder / "checkpoint").iterdir())
    assert names == ["2", "4", "4.superseded", "6", "6.superseded", "8"]
    first, second = tensors(whole, 4), tensors(folder, 4)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    cut_off(folder, 4)
    again = train(2, folder, *arguments)
    (straight,) = [train(2, copy(whole, tmp_path / "straight", 2), *arguments)]
    assert [facts(record) for record in again] == [facts(record) for record in straight]


def test_a_bad_record_can_be_skipped_on_resume(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good words, many of them, and more of them"}\n' * 30 + "{\n")
    arguments = (*SAVING, f"--training.dataset_path={data}", "--data.shuffle=false", "--training.steps=9")
    (outcome,) = launch(1, tmp_path, *arguments, "--checkpoint.interval=1", "--training.seq_len=8")
    assert outcome.code == 2
    assert 'data.on_bad_record = "skip"' in outcome.stderr
    (outcome,) = launch(
        1, tmp_path, *arguments, "--checkpoint.interval=1", "--training.seq_len=8", "--data.on_bad_record=skip"
    )
    assert outcome.code == 0, outcome.stderr
    assert records(tmp_path)[-1]["step"] == 9


def test_counting_from_zero_in_an_old_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "run", 4)
    (outcome,) = launch(1, folder, *SAVING, "--checkpoint.exclude_from_loading=train_state")
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == (
        "error: checkpoint.exclude_from_loading = 'train_state': steps would count from 0 in a folder that holds"
        " step-4; start from it with checkpoint.initial_load_path in a new job.dump_folder"
    )


def test_data_that_end_close_the_job_properly(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a few words, no more"}\n' * 100)
    arguments = (*SAVING, f"--training.dataset_path={data}", "--data.on_end=stop", "--metrics.log_freq=100")
    (outcome,) = launch(1, tmp_path, *arguments, "--training.steps=50", "--checkpoint.interval=50")
    assert outcome.code == 0, outcome.stderr
    last = records(tmp_path)[-1]["step"]
    assert 1 < last < 50
    assert f"the data ended after step {last} of 50" in outcome.stderr
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"step-{last}"]
    (outcome,) = launch(1, tmp_path, *arguments, "--training.steps=50", "--checkpoint.last_save_in_hf")
    assert outcome.code == 0
    assert (tmp_path / f"export/step-{last}/model.safetensors").is_file()  # as if a kill had come before it
    assert f"nothing to do: the data ended after step {last} of 50" in outcome.stderr


def test_a_finished_job_is_extended_and_a_done_one_says_so(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "run", 6)
    outcomes = launch(2, folder, *SAVING)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "nothing to do: step 6 of training.steps = 6 is done" in outcomes[0].stderr
    extended = train(2, folder, *SAVING, "--training.steps=7")
    assert [record["step"] for record in extended] == [1, 2, 3, 4, 5, 6, 7]
    assert extended[-1]["lr"] > 0


def test_another_job_is_refused_by_the_keys_that_differ(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "run", 4)
    (outcome,) = launch(1, folder, *SAVING, "--training.seq_len=20", "--optimizer.lr=0.001", "--debug.seed=8")
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == (
        "error: checkpoint step-4 belongs to another job: debug.seed: 7 saved, 8 now; optimizer.lr: 0.0008 saved,"
        " 0.001 now; training.seq_len: 24 saved, 20 now; set these keys back, start a new job.dump_folder, or start"
        " from its weights with checkpoint.initial_load_path in a new job.dump_folder"
    )


def test_weights_of_another_job_start_a_new_one(whole: Path, tmp_path: Path) -> None:
    start = f"--checkpoint.initial_load_path={whole}/checkpoint/step-6"
    fresh = train(1, tmp_path / "a", *SAVING[3:], "--training.steps=1", "--training.seq_len=20")
    tuned = train(1, tmp_path / "b", *SAVING, start, "--training.steps=1", "--training.seq_len=20")
    assert tuned[0]["step"] == 1
    assert tuned[0]["tokens"] == fresh[0]["tokens"]
    assert tuned[0]["loss"] < fresh[0]["loss"] - 0.01


@pytest.mark.slow
@pytest.mark.shows("checkpoint.exclude_from_loading")
def test_parts_that_are_left_out_start_anew(whole: Path, tmp_path: Path) -> None:
    def third(name: str, *parts: str) -> dict[str, Any]:
        folder = copy(whole, tmp_path / name, 2)
        exclude = [f"--checkpoint.exclude_from_loading={','.join(parts)}"] if parts else []
        return train(2, folder, *SAVING, *exclude)[2]

    everything, data, schedule = third("all"), third("data", "dataloader"), third("lr", "lr_scheduler")
    assert (data["tokens"], data["loss"]) != (everything["tokens"], everything["loss"])
    assert schedule["loss"] == everything["loss"]
    assert schedule["lr"] == pytest.approx(0.0004)  # step 1 of a warm-up of 2, at a peak of 8e-4
    assert everything["lr"] == pytest.approx(0.0008)


def test_only_weights_at_the_end_cannot_be_resumed_but_can_be_started_from(tmp_path: Path) -> None:
    arguments = (*SAVING, "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16")
    train(1, tmp_path / "a", *arguments, "--training.steps=1")
    (again,) = launch(1, tmp_path / "a", *arguments, "--training.steps=1")
    assert (again.code, "nothing to do: step 1 of training.steps = 1 is done" in again.stderr) == (0, True)
    (outcome,) = launch(1, tmp_path / "a", *arguments, "--training.steps=2")
    assert outcome.code == 2
    assert "checkpoint step-1 holds only weights (checkpoint.last_save_model_only)" in outcome.stderr
    start = f"--checkpoint.initial_load_path={tmp_path}/a/checkpoint/step-1"
    assert train(1, tmp_path / "b", *SAVING, start)[0]["step"] == 1


def test_load_only_saves_nothing(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "run", 4)
    train(2, folder, *SAVING, "--checkpoint.load_only")
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-2", "step-4"]


def test_an_environment_without_the_package_installed_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set-up takes an active environment that satisfies the ranges, and only puts the checkout on the path."""

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("components.runtime.provenance.version", absent)
    identity = JobIdentity({})
    assert (identity.versions["espalier"], identity.versions["torch"]) == ("n/a", "n/a")


@pytest.mark.parametrize("sizes", [None, "many", {"training.global_batch_size": "12"}])
def test_a_manifest_without_sizes_is_refused_in_words(sizes: object) -> None:
    manifest = SimpleNamespace(layout={} if sizes is None else {"sizes": sizes})
    persistence = object.__new__(Persistence)
    persistence.source = Source(4, cast(Manifest, manifest), model_only=False)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint step-4: its manifest does not say the sizes of its batches"
    ):
        _ = persistence.saved_sizes
