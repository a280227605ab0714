"""Any layout exports the same bytes and imports the same weights, each rank reading what it holds."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from components.checkpoint.boxes import boxes_of
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.config.job_config import JobConfig
from components.layers.shapes import ExpertsShape
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.runtime.errors import CheckpointError
from models.llama3.args import Llama3Args
from models.qwen3.args import Qwen3Args
from models.train_spec import families
from tests.models.hf_twins import JOB, export
from tests.ranks import run_ranks
from trainer.build import build_stages

LLAMA = Llama3Args(dim=24, n_layers=3, n_heads=6, n_kv_heads=2, ffn_hidden=37, vocab_size=65)
TIED = replace(LLAMA, tied_embeddings=True)
MOE = Qwen3Args(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    vocab_size=65,
    experts=ExpertsShape(count=6, per_token=2, hidden=14, bias_rate=0.01),
)
CASES: dict[str, tuple[str, Any, Degrees]] = {
    "fsdp × tp": ("llama3", LLAMA, Degrees(dp_shard=2, tp=2)),
    "tied stages × fsdp": ("llama3", TIED, Degrees(pp=2, dp_shard=2)),
    "experts × fsdp": ("qwen3", MOE, Degrees(dp_shard=4, ep=2)),
    "experts cut": ("qwen3", MOE, Degrees(dp_shard=2, tp=2, ep=2, etp=2)),
}
SHARD_BYTES = 9_000


def layout(family: str, args: Any, degrees: Degrees, seed: int) -> dict[str, Tensor]:
    """What this rank holds of a model, but for the copy of a tied matrix."""
    job = JobConfig()
    job = replace(job, parallelism=replace(job.parallelism, pipeline_parallel_degree=degrees.pp))
    dims = ParallelDims.build(degrees, "cpu")
    spec = families.lookup(family).load()
    stages = build_stages(spec, args, job, dims, torch.device("cpu"), torch.float32, seed)
    return model_tensors([stage.module for stage in stages])


def digests(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def out_and_in(root: str, family: str, args: Any, degrees: Degrees) -> dict[str, float]:
    """Save and export a model of seed 3; import it into one of seed 4. The sum of each tensor's part here, after a look
    at every element."""
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks, adapter = Ranks(group), families.lookup(family).load().state_dict_adapter
    assert adapter is not None
    tensors = layout(family, args, degrees, 3)
    for name, tensor in tensors.items():
        if name.endswith("expert_bias"):
            tensor.fill_(0.5)
    Checkpointer(Path(root), keep_latest_k=0, group=group).save_model(1, tensors, JOB, torch.float32)
    folder = export(Path(root), adapter, args, ranks=ranks, shard_bytes=SHARD_BYTES)
    found = layout(family, args, degrees, 4)
    load_hf(folder.path, found, adapter, args, ranks)
    want, sums = boxes_of(tensors), dict[str, float]()
    for name, box in boxes_of(found).items():
        bias = name.endswith("expert_bias")
        same = (
            not box.data.any() if bias else torch.equal(box.data.view(torch.int32), want[name].data.view(torch.int32))
        )
        assert same, name
        sums[name] = box.data.double().sum().item()
    return sums


@pytest.mark.parametrize("name", CASES)
def test_layouts_export_the_same_and_import_the_same(name: str, tmp_path: Path) -> None:
    family, args, degrees = CASES[name]
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    whole = out_and_in(str(alone), family, args, Degrees())
    parts = run_ranks(degrees.world, out_and_in, str(cut), family, args, degrees)
    assert {name for each in parts for name in each} == {*whole}
    exported = digests(alone / "export" / "step-1")
    assert len(exported) > 6
    assert digests(cut / "export" / "step-1") == exported


def imports(path: str, family: str, args: Any, degrees: Degrees) -> str:
    """The error of an import."""
    adapter = families.lookup(family).load().state_dict_adapter
    assert adapter is not None
    tensors = layout(family, args, degrees, 4)
    before = {name: box.data.clone() for name, box in boxes_of(tensors).items()}
    with pytest.raises(CheckpointError) as error:
        load_hf(path, tensors, adapter, args, Ranks(dist.group.WORLD))
    assert all(torch.equal(box.data, before[name]) for name, box in boxes_of(tensors).items())
    return str(error.value)


def test_stages_agree_on_what_is_wrong(tmp_path: Path) -> None:
    """Of another flavor: what either stage misses or has too many is one list on both, and nothing is loaded."""
    out_and_in(str(tmp_path), "llama3", LLAMA, Degrees())
    path = str(tmp_path / "export" / "step-1")
    first, second = run_ranks(2, imports, path, "llama3", replace(TIED, n_layers=4, ffn_hidden=38), Degrees(pp=2))
    assert first == second
    shape = "model.layers.0.mlp.down_proj.weight has shape [24, 37], this model [24, 38]"
    missing = "missing: model.layers.3.input_layernorm.weight, model.layers.3.mlp.down_proj.weight, "
    for part in (
        f"Hugging Face weights in '{path}' do not fit: config.json: intermediate_size = 37, this model has 38; "
        "config.json: num_hidden_layers = 3, this model has 4; "
        "config.json: tie_word_embeddings = false, this model has true; ",
        missing,
        shape,
    ):
        assert part in first
