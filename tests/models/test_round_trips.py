"""Files of transformers' making, through `hf-to-dcp` and back through `dcp-to-hf --dtype source`: the same names,
shapes, types and bytes, for every family.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.decoder.args import DecoderArgs
from models.train_spec import families, register_train_spec
from tests.models.families import FAMILIES
from tests.models.parity import adapter_of
from tests.ranks import run_ranks
from trainer.convert import hf_to_dcp, target_of
from trainer.exports import export_checkpoint

SHAPES = 2
"""Drawn of each family; they must differ in what the table of names depends on."""


def kind(args: DecoderArgs) -> tuple[bool, Any]:
    """What makes another table."""
    experts = args.experts
    return args.tied_embeddings, experts and (experts.score, experts.shared_hidden > 0)


def shapes(family: str) -> dict[str, DecoderArgs]:
    """The first that are drawn, each of another kind where the family has several."""
    drawn = [FAMILIES[family].draw(random.Random(f"round trips {family} {seed}")) for seed in range(20)]
    others = [*{kind(args): args for args in reversed(drawn)}.values(), *drawn]
    return {str(number): args for number, args in enumerate(others[:SHAPES])}


def files_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def written_by_transformers(family: str, args: DecoderArgs, folder: Path) -> dict[str, Tensor]:
    """Random weights in bfloat16, selection biases in fp32, as they are published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_bytes(adapter_of(family).config_bytes(args, "bfloat16"))
    twin: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in (*twin.named_parameters(), *twin.named_buffers()):
            if "inv_freq" not in name:
                value.copy_(torch.randn(value.shape, generator=draw))
    for module in twin.modules():
        if "e_score_correction_bias" in dict(module.named_buffers(recurse=False)):
            module.e_score_correction_bias = module.e_score_correction_bias.float() + 1e-4
    twin.save_pretrained(folder, max_shard_size="10kB")
    return files_of(folder)


def there_and_back(family: str, number: str, root: str) -> str:
    """The folder of what `root/theirs` has become, in a process of its own, which alone knows these shapes by name."""
    register_train_spec(f"round_{family}", replace(families.lookup(family).load(), model_args=shapes(family)))
    path = hf_to_dcp(f"{root}/theirs", f"{root}/dcp", target_of(f"round_{family}", number))
    return export_checkpoint(path, f"{root}/back", "source", None, "")


@pytest.mark.parametrize("number", [str(number) for number in range(SHAPES)])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_come_back_as_they_were(family: str, number: str, tmp_path: Path) -> None:
    args = shapes(family)[number]
    theirs = written_by_transformers(family, args, tmp_path / "theirs")
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 1
    found = files_of(Path(run_ranks(1, there_and_back, family, number, str(tmp_path), backend=None)[0]))
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
        key: (value.dtype, value.shape) for key, value in theirs.items()
    }
    differ = [
        key for key, value in theirs.items() if not torch.equal(*(v.view(torch.uint8) for v in (found[key], value)))
    ]
    assert differ == []
    config = json.loads((tmp_path / "theirs" / "config.json").read_bytes())
    assert adapter_of(family).config_problems(config, args) == []
