"""What the keys about Hugging Face weights do: which exports a job leaves, and that another starts from one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.llama3.args import FLAVORS
from tests.keys.jobs import Done, run_jobs
from tests.ranks import run_ranks
from trainer.config.inactive import inactive
from trainer.config.load import load_job
from trainer.config.validate import validate
from trainer.exports import export_checkpoint

shows = pytest.mark.shows
SAVING = ("--checkpoint.enable", "--checkpoint.interval=500")
LAST = (*SAVING, "--checkpoint.last_save_in_hf")
JOBS = {
    "none": SAVING,
    "last": LAST,
    "half": (*LAST, "--checkpoint.export_dtype=bfloat16", "--checkpoint.last_save_model_only"),
    "interval": (*SAVING, "--checkpoint.export_interval=2", "--checkpoint.export_dtype=float16"),
    "folder": (*LAST, "--checkpoint.export_interval=1", "--checkpoint.export_folder=other/place"),
    "from": (
        *SAVING,
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.initial_load_path={folder}/last/export/step-3",
        "--debug.seed=99",
        "--optimizer.lr=1e-9",
        "--checkpoint.last_save_in_hf",
    ),
    "other flavor": (
        *SAVING,
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.initial_load_path={folder}/last/export/step-3",
        "--model.flavor=tied",
    ),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), JOBS)


def weights(done: Done, step: str = "export/step-3") -> dict[str, torch.Tensor]:
    with safe_open(done.folder / step / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


@shows("checkpoint.last_save_in_hf", "checkpoint.export_interval", "checkpoint.export_folder")
def test_what_is_exported(done: dict[str, Done]) -> None:
    exported = {
        "none": [],
        "last": ["export/step-3"],
        "interval": ["export/step-2"],
        "folder": ["other/place/step-1", "other/place/step-2", "other/place/step-3"],
    }
    for name, folders in exported.items():
        files = done[name].files()
        assert [f for f in files if f.endswith("model.safetensors")] == [f"{f}/model.safetensors" for f in folders]
        assert [f for f in files if f.startswith("checkpoint/") and f.endswith("manifest.json")] == [
            "checkpoint/step-3/manifest.json"
        ]
        assert done[name].column("loss") == done["none"].column("loss")
    assert json.loads((done["last"].folder / "export/step-3/config.json").read_bytes())["model_type"] == "llama"
    assert "export/step-3/tokenizer.json" in done["last"].files()
    early, late = weights(done["folder"], "other/place/step-2"), weights(done["last"])
    alone = weights(done["interval"], "export/step-2")  # of a step that is no checkpoint
    assert all(torch.equal(early[key].half(), value) for key, value in alone.items())
    assert not all(torch.equal(early[key], late[key]) for key in late)


def test_an_export_that_a_kill_came_before_is_made_when_the_job_goes_on(done: dict[str, Done]) -> None:
    """The checkpoint is there first, so that nothing else would be due for its step again."""
    folders = {name: done["last"].folder.parent / f"{name} again" for name in ("last", "interval")}
    for folder in folders.values():
        shutil.copytree(done["last"].folder, folder)
        shutil.rmtree(folder / "export")
    there = {name: f"--job.dump_folder={folder}" for name, folder in folders.items()}
    more = ("--checkpoint.export_interval=3", "--training.steps=4")
    run_jobs(folders["last"].parent / "again", {"last": (*LAST, there["last"])})
    run_jobs(folders["last"].parent / "on", {"interval": (*SAVING, *more, there["interval"])})
    for folder in folders.values():
        assert sorted(path.name for path in (folder / "export").glob("step-*")) == ["step-3"]
        again = (folder / "export/step-3/model.safetensors").read_bytes()
        assert again == (done["last"].folder / "export/step-3/model.safetensors").read_bytes()


def test_weights_that_are_saved_only_to_be_exported_are_not_told_as_a_checkpoint(done: dict[str, Done]) -> None:
    job = done["interval"]
    saves = [(event["step"], event["kind"]) for event in job.events if event["event"] == "saved"]
    assert saves == [(2, "hf"), (3, "training")]
    assert "saved step-2:" not in job.log
    assert "saved weights of step-2, to be exported: " in job.log


def test_the_type_of_an_export(done: dict[str, Done]) -> None:
    full, half = weights(done["last"]), weights(done["half"])
    assert {value.dtype for value in full.values()} == {torch.float32}
    assert all(torch.equal(full[key].bfloat16(), half[key]) for key in full)


@shows("checkpoint.initial_load_in_hf")
def test_a_job_starts_from_an_export(done: dict[str, Done]) -> None:
    """Its weights are the export's: with next to no learning rate they are still those at the end."""
    assert f"of Hugging Face weights from '{done['last'].folder}/export/step-3'" in done["from"].log
    assert [record["step"] for record in done["from"].steps] == [1, 2, 3]
    start, end = weights(done["last"]), weights(done["from"])
    assert all(torch.allclose(start[key], end[key], rtol=0, atol=1e-7) for key in start)


def test_a_job_of_another_flavor_does_not(done: dict[str, Done]) -> None:
    outcome = done["other flavor"].outcome
    assert outcome.code == 2
    assert "config.json: tie_word_embeddings = false, this model has true" in outcome.stderr


def quantize(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """The same model with matrices in FP8, norms in fp32 and the rest in bfloat16; what its weights then are."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    files, found = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in load_file(source / "model.safetensors").items():
        files[name] = found[name] = value if "norm" in name else value.bfloat16()
        if name.endswith("proj.weight"):
            files[name] = (value * 1000).to(torch.float8_e4m3fn)
            blocks = [-(-length // 32) for length in value.shape]
            files[f"{name}_scale_inv"] = scales = torch.arange(1.0, 1 + blocks[0] * blocks[1]).view(blocks) * 1e-4
            factors = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[: value.shape[0], : value.shape[1]]
            found[name] = (files[name].float() * factors).bfloat16()
    save_file(files, target / "model.safetensors")
    config = json.loads((source / "config.json").read_bytes())
    config |= {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}}
    (target / "config.json").write_text(json.dumps(config))
    return found


FROM = (*LAST, "--checkpoint.initial_load_in_hf", "--optimizer.lr=1e-30", "--checkpoint.export_dtype=source")
DEQUANTIZE = "--checkpoint.initial_load_in_hf_quantized"


@shows("checkpoint.initial_load_in_hf_quantized", "checkpoint.export_dtype")
def test_a_job_starts_from_quantized_weights_and_exports_them_as_they_were(done: dict[str, Done]) -> None:
    """Names, types and bytes; from a later run of the job and from its checkpoints too, since these remember them."""
    root = done["last"].folder.parent / "quantized"
    want = quantize(done["last"].folder / "export/step-3", root / "source")
    path = f"--checkpoint.initial_load_path={root}/source"
    jobs = {
        "first": (*FROM, DEQUANTIZE, path),
        "not said": (*FROM, path),
        "plain": (*FROM, DEQUANTIZE, f"--checkpoint.initial_load_path={done['last'].folder}/export/step-3"),
        "on": (*FROM, DEQUANTIZE, path, "--training.steps=4", f"--job.dump_folder={root}/first"),
        "none": (*LAST, "--checkpoint.export_dtype=source"),
        "next": (
            *(*LAST, "--checkpoint.export_dtype=source", "--optimizer.lr=1e-30"),
            f"--checkpoint.initial_load_path={root}/first/checkpoint/step-4",
        ),
    }
    ended = run_jobs(root, jobs)
    assert "14 of them quantized in the files" in ended["first"].log
    where = (f"{root}/first/checkpoint/step-3", f"{root}/alone")
    run_ranks(1, export_checkpoint, *where, "source", None, "tests.keys.recording", backend=None)
    for folder in ("first/export/step-3", "first/export/step-4", "next/export/step-3", "alone/step-3"):
        written = load_file(root / folder / "model.safetensors")
        assert {name: value.dtype for name, value in written.items()} == {n: v.dtype for n, v in want.items()}
        assert all(torch.equal(written[name], value) for name, value in want.items())
    told = {
        "not said": "config.json: the weights are quantized (fp8): set checkpoint.initial_load_in_hf_quantized to true",
        "plain": "checkpoint.initial_load_in_hf_quantized = true, but config.json has no quantization_config: set it to"
        " false",
        "none": 'checkpoint.export_dtype = "source": these weights do not come from Hugging Face files, whose types'
        ' they could have; take "float32", "bfloat16" or "float16"',
    }
    for name, text in told.items():
        assert ended[name].outcome.code == 2
        assert text in ended[name].outcome.stderr


def problems(*arguments: str) -> list[str]:
    job = load_job(("--checkpoint.enable", *arguments), {}).job
    return validate(job, 1, FLAVORS["debugmodel"])


def test_what_cannot_go_together() -> None:
    path, key = "--checkpoint.initial_load_path=x", "checkpoint.initial_load_in_hf"
    assert problems(f"--{key}", path) == []
    assert problems(f"--{key}") == [
        f"{key} = true: checkpoint.initial_load_path does not say where the weights are; set it, or this to false"
    ]
    assert problems(f"--{key}", path, "--checkpoint.initial_load_model_only=false") == [
        f"{key} = true: nothing but weights is there, so checkpoint.initial_load_model_only cannot be false; leave it"
        " out"
    ]
    assert problems(f"--{key}", path, '--checkpoint.exclude_from_loading=["model"]') == [
        f'{key} = true: checkpoint.exclude_from_loading has "model", so that nothing would be loaded; leave one out'
    ]
    for folder in ("checkpoint", "./checkpoint/"):
        assert problems("--checkpoint.last_save_in_hf", f"--checkpoint.export_folder={folder}") == [
            f'checkpoint.export_folder = "{folder}": checkpoints are there already, under the same names; give it a'
            " folder other than checkpoint.folder"
        ]
    assert problems("--checkpoint.export_folder=checkpoint") == []


def test_what_does_nothing() -> None:
    def why(key: str, *arguments: str) -> str | None:
        return inactive(load_job(("--checkpoint.enable", *arguments), {}).job, f"checkpoint.{key}")

    nothing = "nothing is exported: checkpoint.last_save_in_hf is false and export_interval is 0"
    assert why("export_folder") == nothing
    assert why("export_dtype") == (
        "no save is model-only and nothing is exported: checkpoint.last_save_model_only is false"
    )
    for key in ("export_folder", "export_dtype"):
        assert why(key, "--checkpoint.export_interval=5") is None
        assert why(key, "--checkpoint.last_save_in_hf") is None
    for key in ("export_folder", "export_interval", "last_save_in_hf"):
        assert why(key, "--checkpoint.load_only") == "checkpoint.load_only saves nothing"
    assert why("initial_load_in_hf_quantized") == "checkpoint.initial_load_in_hf is false"
