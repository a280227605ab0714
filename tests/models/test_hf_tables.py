"""The tables of names of all families: each published flavor is covered, tensor by tensor, and torch stays out."""

import subprocess
import sys

import pytest
import torch

from components.checkpoint.state import model_tensors
from models.train_spec import families

FAMILIES = ("deepseek_v3", "gemma3", "gpt_oss", "llama3", "llama4", "mistral", "qwen3")
FLAVORS = [(name, flavor) for name in FAMILIES for flavor in families.lookup(name).flavors]


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_a_flavor_is_covered(family: str, flavor: str) -> None:
    spec = families.lookup(family).load()
    args = spec.model_args[flavor]
    with torch.device("meta"):
        model = spec.model_cls(args)
    shapes = {name.removeprefix("model."): tuple(value.shape) for name, value in model_tensors([model]).items()}
    assert spec.state_dict_adapter is not None
    table = spec.state_dict_adapter.table(args, shapes)
    assert {*table.ours} | {*table.alone} == {*shapes}
    buffers = sum(torch.Size(shapes[name]).numel() for name in table.buffers)
    assert sum(torch.Size(shape).numel() for shape in table.theirs.values()) == args.parameter_count() + buffers
    assert sum(link.count for link in table.links) == args.parameter_count() + buffers
    assert ("lm_head.weight" in table.theirs) != spec.state_dict_adapter.to_config(args)["tie_word_embeddings"]
    assert table.theirs["model.embed_tokens.weight"] == shapes["tok_embeddings.weight"]


def test_tables_need_no_torch() -> None:
    tables = ", ".join(f"models.{family}.hf" for family in FAMILIES)
    code = f"import sys, {tables}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
