"""scripts/convert.py between Hugging Face's files and ours: the same bytes, the same jobs, and a check that bites."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.hf_export import export_hf
from components.checkpoint.manifest import read_manifest
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import ALL_BUT_MODEL, model_tensors
from components.checkpoint.storage import open_folder, open_storage
from components.layers.initialize import initialize
from components.runtime.errors import CheckpointError
from tests.trainer.runs import facts, train
from trainer import convert, verify
from trainer.build import build_on_meta, materialize, zero_buffers
from trainer.convert import Target, target_of, target_of_checkpoint
from trainer.exports import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CUSTOM = "tests.trainer.tiny"
JOB = ("--model.name=tiny_llama", "--model.flavor=untied")


def tool(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "scripts/convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments])


def model_of(target: Target, seed: int = 1) -> Any:
    model: Any = build_on_meta(target.spec, target.args, target.job)
    materialize(model, "cpu")
    zero_buffers(model, "cpu")
    initialize(model, model.inits(), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wq.weight", "wk.weight")):
                parameter.mul_(20.0)  # so that it matters where a query looks
    return model


def tensors_of(path: str, target: Target) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ours."""
    tensors = model_tensors([model_of(target, seed=9)])
    store = Checkpointer(path, keep_latest_k=0, group=None)
    store.load(path, tensors, job=None, exclude=ALL_BUT_MODEL, cast=True)
    return tensors


def saved(root: Path, target: Target, seed: int = 1) -> str:
    """A checkpoint of a model, step 4."""
    store = Checkpointer(root, keep_latest_k=0, group=None)
    tensors = model_tensors([model_of(target, seed)])
    return store.save_model(4, tensors, target.identity({}), torch.float32).path


def hf_of(folder: Path, target: Target, seed: int = 1, dtype: str = "float32") -> str:
    """The same model as Hugging Face's files."""
    return export_checkpoint(saved(folder / "ours", target, seed), str(folder / "hf"), dtype, None, CUSTOM)


@pytest.mark.parametrize(
    ("name", "flavor"), [("tiny_llama", "untied"), ("tiny_llama", "tied"), ("qwen3", "debugmodel_moe")]
)
def test_there_and_back_are_the_same_bytes(name: str, flavor: str, tmp_path: Path) -> None:
    target = target_of(name, flavor, CUSTOM)
    hf = hf_of(tmp_path, target)
    path = convert.hf_to_dcp(hf, str(tmp_path / "back"), target)
    manifest = read_manifest(open_folder(path))
    assert (path, manifest.kind, manifest.step) == (str(tmp_path / "back/step-0"), "model_only", 0)
    assert (manifest.fingerprint["model.name"], manifest.fingerprint["model.flavor"]) == (name, flavor)
    first, second = tensors_of(str(tmp_path / "ours/step-4"), target), tensors_of(path, target)
    assert {*first} == {*second}
    for tensor_name, tensor in first.items():
        assert torch.equal(tensor, second[tensor_name]), tensor_name
    again = export_checkpoint(path, str(tmp_path / "again"), "source", None, CUSTOM)
    for file in Path(hf).glob("*.safetensors"):
        assert file.read_bytes() == (Path(again) / file.name).read_bytes()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_job_that_looks_ahead_by_its_own_number_is_converted(depth: int, tmp_path: Path) -> None:
    """Out as the job itself would export it, and in again; the flavor's number is 2."""
    target = target_of("tiny_deepseek", "moe", "tests.models.deepseek_v3.tiny", mtp_layers=depth)
    hf = hf_of(tmp_path, target)
    config = json.loads((Path(hf) / "config.json").read_bytes())
    assert config["num_nextn_predict_layers"] == depth
    model = ["--model.name", "tiny_deepseek", "--model.flavor", "moe"]
    told = ["--model.mtp_layers", str(depth)]
    assert tool("hf-to-dcp", hf, str(tmp_path / "dcp"), *model, *told) == 0
    first, path = tensors_of(str(tmp_path / "ours/step-4"), target), str(tmp_path / "dcp/step-0")
    assert read_manifest(open_folder(path)).fingerprint["model.mtp_layers"] == depth
    second = tensors_of(path, target_of_checkpoint(path))
    assert {*first} == {*second}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(".eh_proj." in name for name in first) == depth


def test_an_export_says_what_the_job_said_of_experts(tmp_path: Path) -> None:
    """As the trainer's own exports do."""
    target = target_of("qwen3", "debugmodel_moe", balance_coefficient=0.25, bias_rate=0.01)
    config = json.loads((Path(hf_of(tmp_path, target)) / "config.json").read_bytes())
    assert config["router_aux_loss_coef"] == 0.25


def test_weights_keep_their_type_or_take_another(tmp_path: Path) -> None:
    target = target_of("tiny_llama", "untied", CUSTOM)
    hf = hf_of(tmp_path, target, dtype="bfloat16")
    types = {}
    for dtype in ("source", "float32", "float16"):
        path = convert.hf_to_dcp(hf, str(tmp_path / dtype), target, dtype)
        index = json.loads((Path(path) / "tensors.json").read_bytes())
        types[dtype] = {entry["dtype"] for entry in index.values()}
        assert len({piece["file"] for entry in index.values() for piece in entry["pieces"]}) == len(index)
    assert types == {"source": {"bfloat16"}, "float32": {"float32"}, "float16": {"float16"}}
    first, second = (
        tensors_of(str(tmp_path / "source/step-0"), target),
        tensors_of(str(tmp_path / "float32/step-0"), target),
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_job_starts_from_it_as_from_the_files_themselves(tmp_path: Path) -> None:
    target = target_of("tiny_llama", "untied", CUSTOM)
    hf = hf_of(tmp_path, target)
    path = convert.hf_to_dcp(hf, str(tmp_path / "dcp"), target)
    convert.hf_to_dcp(hf, str(tmp_path / "seeded/checkpoint"), target)
    on = "--checkpoint.enable=true"
    start = f"--checkpoint.initial_load_path={hf}"
    expected = train(1, tmp_path / "a", on, start, "--checkpoint.initial_load_in_hf=true")
    loaded = train(1, tmp_path / "b", on, f"--checkpoint.initial_load_path={path}")
    seeded = train(1, tmp_path / "seeded", on)
    assert [*map(facts, loaded)] == [*map(facts, expected)] == [*map(facts, seeded)]


def test_verify_compares_with_transformers_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    target = target_of("tiny_llama", "untied", CUSTOM)
    hf = hf_of(tmp_path, target)
    how = ["--custom-import", CUSTOM, "--verify"]
    model = ["--model.name", "tiny_llama", "--model.flavor", "untied"]
    for dtype in ("source", "bfloat16"):
        assert tool("hf-to-dcp", hf, str(tmp_path / dtype), *model, "--dtype", dtype, *how) == 0
    told = capsys.readouterr().out
    assert f'initial_load_path = "{tmp_path / "source"}/step-0"' in told
    rows = [line.split("  ")[0] for line in told.splitlines()[-5:]]
    assert rows == ["", "embeddings", "block 0", "block 1 and norm", "logits"]
    ours = str(tmp_path / "ours/step-4")
    assert tool("dcp2hf", ours, str(tmp_path / "out"), "--dtype", "bfloat16", *how) == 0
    capsys.readouterr()

    path = tmp_path / "other"
    reference = verify.of_transformers(hf, target, "source")
    found = verify.of_checkpoint(saved(path, target, seed=2), target, "source")
    rows_found = verify.differences(found, reference)
    assert not any(verify.passes(row, 1e-4) for row in rows_found)


def test_verify_finds_rows_in_another_order_and_says_where(tmp_path: Path) -> None:
    target = target_of("tiny_llama", "untied", CUSTOM)
    right = model_of(target)
    store = Checkpointer(tmp_path, keep_latest_k=0, group=None)
    good = store.save_model(1, model_tensors([right]), target.identity({}), torch.float32).path
    with torch.no_grad():
        wq = right.layers["1"].attention.wq.weight
        wq.copy_(wq.unflatten(0, (3, 4, 2)).transpose(1, 2).flatten(0, 2))
    bad = store.save_model(2, model_tensors([right]), target.identity({}), torch.float32).path
    traces = [verify.of_checkpoint(path, target, "source") for path in (bad, good)]
    rows = verify.differences(*traces)
    assert [verify.passes(row, 1e-4) for row in rows] == [True, True, False, False]
    assert [row.absolute for row in rows[:2]] == [0.0, 0.0]
    assert "block 1 and norm" in (text := verify.table(rows, 1e-4))
    assert text.count("above 0.0001") == 2


def test_what_is_not_a_number_does_not_pass() -> None:
    good = verify.Trace([torch.ones(1, 2, 3)] * 3, torch.ones(1, 2, 5))
    bad = verify.Trace([torch.ones(1, 2, 3)] * 3, torch.full((1, 2, 5), float("nan")))
    assert [verify.passes(row, 1.0) for row in verify.differences(bad, good)] == [True, True, True, False]


def test_wrong_input_is_told_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = target_of("tiny_llama", "untied", CUSTOM)
    hf = hf_of(tmp_path, target)
    out = str(tmp_path / "out")
    wrong = ["--model.name", "tiny_llama", "--model.flavor", "tied", "--custom-import", CUSTOM]
    assert tool("hf2dcp", hf, out, *wrong) == 2
    assert "config.json: tie_word_embeddings = false, this model has true" in capsys.readouterr().err
    assert tool("hf2dcp", hf, out, "--model.name", "lama3", "--model.flavor", "8B") == 2
    assert "model.name = 'lama3': no such model family" in capsys.readouterr().err
    assert tool("hf2dcp", str(tmp_path / "none"), out, *wrong) == 2
    assert "none" in capsys.readouterr().err
    assert not Path(out).exists()
    convert.hf_to_dcp(hf, out, target)
    with pytest.raises(CheckpointError, match="is there already: move it away, or take another folder"):
        convert.hf_to_dcp(hf, out, target)


MEASURE = """
import sys
from pathlib import Path
from trainer import convert
from tests.scripts.test_convert import wide

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line)

small, large, out = sys.argv[1:]
convert.hf_to_dcp(small, out + ".small", wide(64), "float32")  # imports what is imported lazily
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten; rusage's is the parent's at first
before = peak()
convert.hf_to_dcp(large, out, wide(1024), "float32")
print(peak() - before)
"""


def wide(dim: int) -> Target:
    """A model of eight blocks; of dim 1024 each has 54 MB in fp32, of which the largest tensor has 13 MB."""
    target = target_of("llama3", "debugmodel")
    sizes: dict[str, Any] = {"dim": dim, "n_layers": 8, "ffn_hidden": 3 * dim, "vocab_size": 1024}
    return replace(target, args=replace(target.args, **sizes))


def bf16_files(root: Path, target: Target) -> str:
    """A model as Hugging Face's files in bfloat16."""
    store = Checkpointer(root / "ours", keep_latest_k=0, group=None)
    source = store.save_model(1, model_tensors([model_of(target)]), target.identity({}), torch.float32)
    adapter, hf = target.spec.state_dict_adapter, open_storage(str(root / "hf"))
    assert adapter is not None
    hf.prepare()
    manifest = read_manifest(source)
    return export_hf(source, manifest, hf, "step-1", adapter, target.args, dtype="bfloat16", ranks=Ranks(None)).path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = bf16_files(tmp_path / "small", wide(64)), bf16_files(tmp_path / "large", wide(1024))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    largest, whole = 3072 * 1024 * 4, 4 * wide(1024).args.parameter_count()
    grown = int(done.stdout.splitlines()[-1])
    print(f"{grown / 1e6:.0f} MB for a model of {whole / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert whole > 25 * largest
    assert grown < 8 * largest
