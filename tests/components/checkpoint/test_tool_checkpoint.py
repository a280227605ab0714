"""`scripts/checkpoint.py`: what it says, to the letter, and its exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.manifest import MANIFEST, Manifest, render
from scripts.checkpoint import main
from tests.components.checkpoint.support import JOB, STATE, checkpointer, save, tensors

LAYOUT = {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2, "pp": 1, "ep": 1, "etp": 1, "device": "cuda"}
CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1, 2 and 10, the last by a job on four ranks."""
    save(tmp_path, 1, 2)
    job = dataclasses.replace(JOB, layout=LAYOUT, revision=None)
    checkpointer(tmp_path).save(10, tensors(10), STATE, job)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str]]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, CREATED.sub("WHEN", told.out + told.err).splitlines()


def export(folder: Path, job: JobIdentity) -> None:
    """What an export's manifest looks like, without the weights."""
    folder.mkdir(parents=True)
    manifest = Manifest(1, "hf", "2026-01-01T00:00:00+00:00", [], job.fingerprint, {}, "", {}, None)
    (folder / MANIFEST).write_bytes(render(manifest))


def cut(folder: Path) -> int:
    """Take its last byte from a checkpoint's state; its size before."""
    raw = (folder / "state.json").read_bytes()
    (folder / "state.json").write_bytes(raw[:-1])
    return len(raw)


def flip(folder: Path) -> int:
    raw = bytearray((folder / "state.json").read_bytes())
    raw[3] ^= 1
    (folder / "state.json").write_bytes(raw)
    return len(raw)


def test_ls(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size, flipped = cut(root / "step-2"), flip(root / "step-1")
    for name in ("step-3", "step-05", ".tmp-step-4-0123456789abcdef", "step-4.superseded-0123", "step-4.broken-01"):
        (root / name).mkdir()
    (root / "step-7").symlink_to("step-1")
    (root / "notes.txt").write_text("mine")
    os.rename(root / "step-10", root / "step-12")
    save(root, 10)
    code, lines = run(capsys, "ls", root)
    rest = [
        "step-12                       its manifest.json says step 10: the folder has been renamed",
        ".tmp-step-4-0123456789abcdef  unfinished: of a run that was killed, or is saving now",
        "step-05                       not a checkpoint: checkpoints are step-N",
        "step-4.broken-01              set aside: broken",
        "step-4.superseded-0123        set aside: of an earlier course of the job",
    ]
    missing = f"no {MANIFEST} in it: not a checkpoint of Espalier, or one that was never finished"
    assert (code, lines) == (
        0,
        [
            "step-1                        training  sizes ok  0.0 MB  n/a  WHEN  revision abc123",
            f"step-2                        state.json has {size - 1} bytes instead of {size}",
            f"step-3                        {missing}",
            "step-10                       training  sizes ok  0.0 MB  n/a  WHEN  revision abc123",
            *rest,
        ],
    )
    _, lines = run(capsys, "ls", "--hashes", root)
    assert lines[0] == f"step-1                        state.json: bytes 0 to {flipped} have changed"
    assert lines[3] == "step-10                       training  whole  0.0 MB  n/a  WHEN  revision abc123"


def test_ls_of_one_checkpoint_and_of_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["step-10  training  sizes ok  0.0 MB  4 × cuda: dp_shard 2, tp 2  WHEN  revision n/a"]
    assert run(capsys, "ls", root / "step-10") == (0, one)
    (tmp_path / "empty").mkdir()
    none = f"error: '{tmp_path}/empty': no checkpoint in it, nor any other folder"
    assert run(capsys, "ls", tmp_path / "empty") == (2, [none])
    assert run(capsys, "ls", root / "x") == (2, [f"error: '{root}/x': No such file or directory"])


def test_verify(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "step-2.broken-01").mkdir()
    assert run(capsys, "verify", root) == (0, ["step-1: whole", "step-2: whole", "step-10: whole"])
    size = flip(root / "step-2")
    broken = f"step-2: state.json: bytes 0 to {size} have changed"
    assert run(capsys, "verify", root) == (2, ["step-1: whole", broken, "step-10: whole"])
    assert run(capsys, "verify", root / "step-2") == (2, [broken])
    assert run(capsys, "verify", f"file://{root}/step-1") == (0, ["step-1: whole"])


def test_verify_of_a_folder_without_checkpoints_verifies_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "out/checkpoint", 1)
    (tmp_path / "out/checkpoint/step-1").rename(tmp_path / "out/checkpoint/step-1.superseded-01")
    for folder, there in (("out", "checkpoint"), ("out/checkpoint", "step-1.superseded-01")):
        told = f"error: '{tmp_path}/{folder}': no checkpoint in it; there is {there}"
        assert run(capsys, "verify", tmp_path / folder) == (2, [told])


def test_diff(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", root / "step-1", root / "step-1") == (
        0,
        ["tensors: 5 equal, 0 differ, 0 in one of them only"],
    )
    mine = tensors(1)
    mine["model.w"][2, 1] += 0.5
    mine["model.half"] = mine["model.half"].float()
    mine["model.count"] = torch.zeros(3, dtype=torch.int64)
    mine["model.v"] = mine.pop("optimizer.w.exp_avg")
    state = {**STATE, "train_state": {"step": 2, "best": float("inf")}, "lr_scheduler": {"last": "x" * 99}}
    checkpointer(root).save(3, mine, state, JobIdentity({"model.name": "tiny", "training.seq_len": 256}))
    relative = 0.5 / float(tensors(1)["model.w"].double().norm())
    code, lines = run(capsys, "diff", root / "step-1", root / "step-3")
    assert (code, lines) == (
        1,
        [
            "job: training.seq_len: 512, 256",
            f'state.lr_scheduler.last: 3, "{"x" * 59}…',
            "state.train_state.lr: 0.1, nothing",
            "state.train_state.step: 1, 2",
            "optimizer.w.exp_avg: only in the first",
            "model.v: only in the second",
            "model.count: int64 [2], int64 [3]",
            "model.half: max 0, relative 0, bfloat16 and float32",
            f"model.w: max 0.5, relative {relative:.3g}",
            "tensors: 1 equal, 3 differ, 2 in one of them only",
        ],
    )
    flip(root / "step-3")
    code, lines = run(capsys, "diff", root / "step-1", root / "step-3")
    assert code == 2
    assert lines[0].startswith(f"error: '{root}/step-3': state.json: bytes 0 to ")


def test_diff_is_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    export(tmp_path / "hf/step-1", JOB)
    told = f"error: '{tmp_path}/hf/step-1': an export of weights as Hugging Face safetensors: give a checkpoint"
    assert run(capsys, "diff", tmp_path / "step-1", tmp_path / "hf/step-1") == (2, [told])
    assert run(capsys, "export", tmp_path / "hf/step-1", tmp_path / "out") == (2, [told])
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_has_no_distance(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tensors(1)
    mine["model.w"][0, 0] = torch.nan
    checkpointer(root).save(3, mine, STATE, JOB)
    code, lines = run(capsys, "diff", root / "step-1", root / "step-3")
    assert (code, lines[0]) == (1, "model.w: max nan, relative nan")


def test_prune(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, 4, 5)
    (root / "step-1/mine.txt").write_text("mine")
    (root / "step-05").mkdir()
    size = flip(root / "step-5")
    would = [
        "step-1: stays: it holds other files (mine.txt)",
        "step-2: would be deleted",
        "step-4: stays",
        "step-5: stays: broken: it does not count",
        "step-10: stays",
    ]
    assert run(capsys, "prune", root, "--keep", "2", "--dry-run") == (0, would)
    assert sorted(os.listdir(root)) == ["step-05", "step-1", "step-10", "step-2", "step-4", "step-5"]
    done = [line.replace("would be deleted", "deleted") for line in would]
    assert run(capsys, "prune", root, "--keep", "2") == (0, done)
    assert sorted(os.listdir(root)) == ["step-05", "step-1", "step-10", "step-4", "step-5"]
    assert size == (root / "step-5/state.json").stat().st_size


def test_prune_of_one_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [f"error: '{root}/step-1': a checkpoint: give the folder that it is in"]
    assert run(capsys, "prune", root / "step-1", "--keep", "1") == (2, told)
    assert (root / "step-1" / MANIFEST).is_file()


def test_prune_keeps_what_training_can_resume_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2)
    checkpointer(tmp_path).save_model(3, tensors(3), JOB, torch.bfloat16)
    told = ["step-1: deleted", "step-2: stays", "step-3: stays"]
    assert run(capsys, "prune", tmp_path, "--keep", "1") == (0, told)


@pytest.mark.parametrize("keep", ["0", "-1", "all"])
def test_prune_wants_a_number(root: Path, keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(root), f"--keep={keep}"])
    assert caught.value.code == 2
    assert f"argument --keep: '{keep}': must be 1 or more" in capsys.readouterr().err


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    text = "error: model name 'tiny': no such thing"
    code, lines = run(capsys, "export", tmp_path / "step-1", tmp_path / "out")
    assert (code, lines[0][:5]) == (2, text[:5])
    flip(tmp_path / "step-1")
    code, lines = run(capsys, "export", tmp_path / "step-1", tmp_path / "out")
    assert code == 2
    assert lines[0].startswith(f"error: '{tmp_path}/step-1': state.json: bytes 0 to ")
    assert not (tmp_path / "out").exists()


def test_export_wants_a_tokenizer_where_it_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        told = f"error: --assets: no tokenizer's files in '{tmp_path}/{folder}'"
        asked = run(capsys, "export", tmp_path / "step-1", tmp_path / "out", "--assets", tmp_path / folder)
        assert asked == (2, [told])
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_script_without_torch(root: Path) -> None:
    script = Path(__file__).resolve().parents[3] / "scripts/checkpoint.py"
    code = (
        "import runpy, sys; sys.argv = ['checkpoint.py', 'verify', sys.argv[1]]\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0 False", "")
    assert json.loads((root / "step-1/state.json").read_bytes())["train_state"]["step"] == 1
