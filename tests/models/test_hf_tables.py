"""The tables of names of all families: each published flavor is covered, tensor by tensor, and torch stays out."""

import subprocess
import sys

import pytest
import torch

from components.checkpoint.state import model_tensors
from components.config.job_config import JobConfig
from components.config.model import Model
from components.config.moe import MoE
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


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_multi_token_prediction_are_left_out_where_they_have_no_place(family: str) -> None:
    """Any decoder can have them, but only DeepSeek's files hold them; elsewhere an export is the plain model."""
    spec = families.lookup(family).load()
    flavor = next(name for name in ("debugmodel_moe", "debugmodel") if name in spec.model_args)
    biased = MoE(bias_rate=0.1)
    jobs = (JobConfig(model=Model(mtp_layers=depth), moe=biased) for depth in (0, 2))
    plain, ahead = (spec.args_for_job_fn(spec.model_args[flavor], job) for job in jobs)
    tables = []
    for args in (plain, ahead):
        with torch.device("meta"):
            tensors = model_tensors([spec.model_cls(args)])
        assert spec.state_dict_adapter is not None
        shapes = {name.removeprefix("model."): tuple(value.shape) for name, value in tensors.items()}
        tables.append((spec.state_dict_adapter.table(args, shapes), shapes))
    (of_plain, _), (of_ahead, shapes) = tables
    modules = {name for name in shapes if name.startswith("mtp")}
    assert modules
    if family == "deepseek_v3":
        assert modules <= {*of_ahead.ours}
    else:
        assert {*of_ahead.alone} == {*of_plain.alone} | modules
        assert (of_ahead.ours, of_ahead.theirs) == (of_plain.ours, of_plain.theirs)
    counted = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in of_ahead.buffers)
    assert counted == ahead.parameter_count()


def test_tables_need_no_torch() -> None:
    tables = ", ".join(f"models.{family}.hf" for family in FAMILIES)
    code = f"import sys, {tables}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
