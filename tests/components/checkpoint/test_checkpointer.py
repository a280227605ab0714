import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.manifest import MANIFEST
from components.checkpoint.state import ALL_BUT_MODEL
from components.runtime.errors import CheckpointError, ConfigError
from tests.components.checkpoint.support import (
    JOB,
    OTHER,
    STATE,
    checkpointer,
    loads,
    same,
    save,
    tensors,
    zeros,
)


def error_of(fn) -> str:  # noqa: ANN001
    with pytest.raises(CheckpointError) as caught:
        fn()
    return str(caught.value)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_round_trip_gives_back_every_byte(tmp_path: Path) -> None:
    folder, size = checkpointer(tmp_path).save(7, tensors(7), STATE, JOB)
    assert folder.path == str(tmp_path / "step-7")
    assert size == sum(file.stat().st_size for file in (tmp_path / "step-7").iterdir() if file.name != "manifest.json")
    assert folder.names() == [".metadata", "__0_0.distcp", "manifest.json", "state.json", "tensors.json"]
    assert os.listdir(tmp_path) == ["step-7"]
    found = zeros()
    found["model.w"].requires_grad_()
    assert checkpointer(tmp_path).load(7, found, job=JOB) == STATE
    assert same(found, tensors(7))


def test_manifest_says_whose_it_is(tmp_path: Path) -> None:
    save(tmp_path, 7)
    manifest = checkpointer(tmp_path).read_manifest(7)
    assert (manifest.step, manifest.kind, manifest.format, manifest.hash) == (7, "training", 1, "xxh3_128")
    assert (manifest.fingerprint, manifest.layout) == (JOB.fingerprint, JOB.layout)
    assert (manifest.config, manifest.revision, manifest.versions) == ("[training]\n", "abc123", JOB.versions)
    assert manifest.versions["torch"] == torch.__version__


def test_nothing_there(tmp_path: Path) -> None:
    empty = checkpointer(tmp_path / "none")
    assert (empty.steps(), empty.latest(), empty.resolve(-1)) == ([], None, None)
    assert not (tmp_path / "none").exists()


def test_step_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    why = "no manifest.json in it: not a checkpoint of Espalier, or one that was never finished"
    assert error_of(lambda: checkpointer(tmp_path).resolve(30)) == (
        f"checkpoint.load_step = 30: checkpoint step-30: {why}; valid in '{tmp_path}': step-10, step-20"
    )
    assert checkpointer(tmp_path).resolve(10) == 10
    assert error_of(lambda: checkpointer(tmp_path).load(30, zeros(), job=JOB)) == f"checkpoint step-30: {why}"


def test_same_step_twice_is_no_work(tmp_path: Path) -> None:
    save(tmp_path, 5)
    before = (tmp_path / "step-5" / MANIFEST).stat().st_mtime_ns
    checkpointer(tmp_path).save(5, tensors(6), STATE, JOB)
    assert (tmp_path / "step-5" / MANIFEST).stat().st_mtime_ns == before
    assert loads(tmp_path, 5)


def test_same_step_of_another_job_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    message = error_of(lambda: checkpointer(tmp_path).save(5, tensors(5), STATE, OTHER))
    assert message.startswith(
        "checkpoint step-5 belongs to another job: training.seq_len: 512 saved, 256 now; set these"
    )
    assert loads(tmp_path, 5)


def test_same_step_of_another_kind_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert error_of(lambda: checkpointer(tmp_path).save_model(5, tensors(5), JOB, torch.float32)) == (
        f"cannot save step-5 in '{tmp_path}': it is there already, as a training checkpoint: move it away first"
    )


@pytest.mark.parametrize("how", ["flip", "no_manifest", "file"])
def test_broken_step_is_moved_aside_not_deleted(tmp_path: Path, how: str) -> None:
    if how == "file":
        (tmp_path / "step-5").write_text("notes")
    else:
        save(tmp_path, 5)
        (tmp_path / "step-5" / MANIFEST).unlink() if how == "no_manifest" else damage(tmp_path / "step-5/__0_0.distcp")
    save(tmp_path, 5)
    assert loads(tmp_path, 5)
    aside = [name for name in os.listdir(tmp_path) if name.startswith("step-5.broken-")]
    assert len(aside) == 1
    assert checkpointer(tmp_path).steps() == [5]


def test_resuming_another_job_lists_what_differs(tmp_path: Path) -> None:
    save(tmp_path, 20)
    now = JobIdentity({"model.name": "tiny", "training.seq_len": 256, "data.streams": 4})
    assert error_of(lambda: checkpointer(tmp_path).load(20, zeros(), job=now)) == (
        "checkpoint step-20 belongs to another job: data.streams: nothing saved, 4 now; training.seq_len: 512 saved, "
        "256 now; set these keys back, start a new job.dump_folder, or start from its weights with "
        "checkpoint.initial_load_path in a new job.dump_folder"
    )


def test_broken_latest_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "step-30/__0_0.distcp")
    with (tmp_path / "step-20/state.json").open("ab") as file:
        file.write(b" ")
    size = (tmp_path / "step-30/__0_0.distcp").stat().st_size
    mine = checkpointer(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert mine.latest() == 10
    state = (tmp_path / "step-20/state.json").stat().st_size
    assert caplog.messages == [
        f"checkpoint step-30 is broken: __0_0.distcp: bytes 0 to {size} have changed: falling back to step-10",
        f"checkpoint step-20: state.json has {state} bytes instead of {state - 1}: falling back to step-10",
    ]
    assert error_of(lambda: checkpointer(tmp_path).resolve(30)).startswith(
        "checkpoint.load_step = 30: checkpoint step-30 is"
    )
    mine.supersede(10)
    assert sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("step-*.*")) == [
        "step-20.broken",
        "step-30.broken",
    ]


def test_all_broken_does_not_start_again_from_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-10/state.json").unlink()
    assert error_of(lambda: checkpointer(tmp_path).latest()) == (
        f"no checkpoint in '{tmp_path}' is valid: checkpoint step-10: state.json is missing; "
        "move them away or start a new job.dump_folder"
    )


def test_must_resume_from_the_newest(tmp_path: Path) -> None:
    assert error_of(lambda: checkpointer(tmp_path).resolve(-1, "must")) == (
        f'checkpoint.resume = "must": there is no checkpoint in \'{tmp_path}\'; take "auto" for a job\'s first run,'
        " whatever it starts from"
    )
    save(tmp_path, 10, 20)
    assert checkpointer(tmp_path).resolve(-1, "must") == 20
    (tmp_path / "step-20/state.json").unlink()
    assert error_of(lambda: checkpointer(tmp_path).resolve(-1, "must")) == (
        'checkpoint.resume = "must": checkpoint step-20: state.json is missing; move it away, or take "auto" to go'
        " on from the one before"
    )
    assert checkpointer(tmp_path).resolve(10, "must") == 10
    assert checkpointer(tmp_path).resolve(-1, "auto") == 10


def test_a_new_course_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 0, 10, 20)
    (tmp_path / "step-20/state.json").unlink()
    checkpointer(tmp_path).supersede(None)
    aside = sorted(os.listdir(tmp_path))
    assert [name.partition(".")[0] for name in aside] == ["step-0", "step-10", "step-20"]
    assert caplog.messages == [
        f"starting anew: {name.partition('.')[0]} is of an earlier course, now '{name}'" for name in aside
    ]
    assert checkpointer(tmp_path).latest() is None
    found = zeros()
    assert checkpointer(tmp_path).load(tmp_path / aside[1], found, job=JOB) == STATE
    assert same(found, tensors(10))


def test_sizes_alone_are_checked_where_that_is_wanted(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-20/.metadata")
    run = Checkpointer(tmp_path, keep_latest_k=0, group=None, verify="sizes")
    assert (run.latest(), run.verify(20), checkpointer(tmp_path).latest()) == (20, [], 10)
    (tmp_path / "step-20/state.json").write_bytes(b"")
    assert run.latest() == 10


def test_an_export_is_no_checkpoint_to_load(tmp_path: Path) -> None:
    checkpointer(tmp_path).save(3, tensors(3), {}, JOB, "hf")
    assert error_of(lambda: checkpointer(tmp_path).load(3, zeros(), job=JOB)) == (
        "checkpoint step-3 is an export of weights as Hugging Face safetensors: set checkpoint.initial_load_in_hf"
    )


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = zeros()
    del found["model.count"], found["optimizer.w.step"]
    found |= {"model.new": torch.zeros(1), "model.w": torch.zeros(3, 5), "model.half": torch.zeros(4)}
    found["optimizer.w.exp_avg"] = torch.zeros(5, 3, device="meta")
    assert error_of(lambda: checkpointer(tmp_path).load(1, found, job=JOB)) == (
        "checkpoint step-1 does not fit: not expected here: model.count, optimizer.w.step; "
        "missing in the checkpoint: model.new; model.half: bfloat16 saved, float32 here; "
        "model.w: shape [5, 3] saved, [3, 5] here; "
        "optimizer.w.exp_avg: is on the meta device here, and has no memory to load into"
    )
    assert not found["model.w"].any()


def test_excluded_parts_stay_as_they_are(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = zeros()
    state = checkpointer(tmp_path).load(1, found, job=JOB, exclude=["optimizer", "dataloader"])
    assert state == {part: STATE[part] for part in ("train_state", "lr_scheduler")}
    assert torch.equal(found["model.w"], tensors(1)["model.w"])
    assert not found["optimizer.w.exp_avg"].any()
    with pytest.raises(ConfigError) as caught:
        checkpointer(tmp_path).load(1, found, job=JOB, exclude=["optimiser"])
    assert str(caught.value) == (
        "checkpoint.exclude_from_loading = 'optimiser': no such part; "
        "allowed: model, optimizer, lr_scheduler, dataloader, train_state, rng (did you mean 'optimizer'?)"
    )


def test_model_only_saves_load_as_weights_but_do_not_resume(tmp_path: Path) -> None:
    folder = checkpointer(tmp_path).save_model(100, tensors(1), JOB, torch.bfloat16)
    assert checkpointer(tmp_path).read_manifest(folder.path).kind == "model_only"
    assert error_of(lambda: checkpointer(tmp_path).load(100, zeros(), job=JOB)) == (
        "checkpoint step-100 holds only weights (checkpoint.last_save_model_only): training cannot resume from it; "
        "resume from an earlier one with checkpoint.load_step, or start from its weights with "
        "checkpoint.initial_load_path in a new job.dump_folder"
    )
    weights = {name: value for name, value in zeros().items() if name.startswith("model.")}
    other = checkpointer(tmp_path / "new")
    assert error_of(lambda: other.load(folder.path, weights, job=None, exclude=ALL_BUT_MODEL)) == (
        "checkpoint step-100 does not fit: model.w: bfloat16 saved, float32 here"
    )
    assert other.load(folder.path, weights, job=None, exclude=ALL_BUT_MODEL, cast=True) == {}
    assert torch.equal(weights["model.w"], tensors(1)["model.w"].bfloat16().float())
    assert torch.equal(weights["model.count"], tensors(1)["model.count"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"train_state": {1: 2}}, "state.train_state has the key 1: keys must be strings"),
        ({"train_state": [1, (2,)]}, "state.train_state[1] is a tuple: JSON cannot give it back as it is"),
        ({"train_state": torch.zeros(1)}, "state.train_state is a Tensor: JSON cannot give it back as it is"),
        ({"train_state": {"best": float("nan")}}, "state.train_state.best is not a number (nan): save None instead"),
    ],
)
def test_state_that_would_come_back_changed_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    assert error_of(lambda: checkpointer(tmp_path).save(1, tensors(1), state, JOB)) == (
        f"cannot save step-1 in '{tmp_path}': {message}"
    )
    assert os.listdir(tmp_path) == []


def test_tensors_without_memory_are_refused(tmp_path: Path) -> None:
    bad: dict[str, Any] = {**tensors(1), "model.m": torch.zeros(1, device="meta"), "model.n": 3}
    assert error_of(lambda: checkpointer(tmp_path).save(1, bad, STATE, JOB)) == (
        f"cannot save step-1 in '{tmp_path}': no tensors with memory: model.m, model.n"
    )


def test_other_tools_can_read_it(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    save(tmp_path, 3)
    dcp_to_torch_save(tmp_path / "step-3", tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt", weights_only=True), tensors(3))


def test_saving_and_verifying_are_fast(tmp_path: Path) -> None:
    model = {f"model.{i}": torch.randn(256, 256) for i in range(300)}  # 79 MB, 6 M parameters with Adam
    started = time.perf_counter()
    checkpointer(tmp_path).save(1, model, STATE, JOB)
    saved = time.perf_counter()
    assert checkpointer(tmp_path).verify(1) == []
    verified = time.perf_counter()
    assert saved - started < 5.0, saved - started  # 0.2 s on an idle machine
    assert verified - saved < 1.0, verified - saved  # 0.01 s
