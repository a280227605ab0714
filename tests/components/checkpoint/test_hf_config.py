"""Forms of config.json that say the same, and that what says something else is told."""

from dataclasses import replace
from typing import Any

import pytest

from components.checkpoint.hf_config import Adapter
from tests.components.checkpoint import hf_tiny as tiny

YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0}


def adapter(written: dict[str, Any], **defaults: Any) -> Adapter:
    """A family that writes this, and knows these defaults of transformers'."""
    return replace(
        tiny.ADAPTER,
        to_config=lambda args: written,
        defaults=lambda args: {**dict.fromkeys(written), **defaults},
    )


def problems(written: dict[str, Any], read: dict[str, Any], **defaults: Any) -> list[str]:
    return adapter(written, **defaults).config_problems(read, tiny.Args())


PLAIN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults written out": (PLAIN, {**PLAIN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}),
    "defaults as null": (PLAIN, {**PLAIN, "beta_fast": None, "mscale": None, "attention_factor": None}),
    "older name of the kind": (PLAIN, {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096}),
    "both names of it": (PLAIN, {**PLAIN, "type": "yarn"}),
    "the scale that follows": (PLAIN, {**PLAIN, "attention_factor": 0.1 * 3.4657359027997265 + 1}),
    "weights that are the same scale": (YARN, {**YARN, "attention_factor": 1.0}),
    "all of a head is turned": (PLAIN, {**PLAIN, "partial_rotary_factor": 1.0}),
    "the longest row": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512},
        {"rope_type": "llama3", "factor": 8.0},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_scalings_that_are_the_same(name: str) -> None:
    written, read = SAME[name]
    base: dict[str, Any] = {"rope_theta": 1e4, "max_position_embeddings": 512}
    ours = {**base, "rope_scaling": written}
    assert problems(ours, {**base, "rope_scaling": read}) == []
    assert problems(ours, {**base, "rope_theta": 1.0, "rope_parameters": {**read, "rope_theta": 1e4}}) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 16.0},
        {"beta_fast": 16},
        {"truncate": False},
        {"attention_factor": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"mscale_all_dim": 1.0},
        {"original_max_position_embeddings": 8192},
        {"partial_rotary_factor": 0.5},
        {"rope_type": "longrope"},
        {"factor": "many", "mscale": "much"},
    ],
)
def test_scalings_that_are_not(changes: dict[str, Any]) -> None:
    (problem,) = problems({"rope_scaling": PLAIN}, {"rope_scaling": {**PLAIN, **changes}})
    assert problem.startswith("rope_scaling = {")
    assert problems({"rope_scaling": PLAIN}, {"rope_scaling": {"rope_type": "default"}})[0].startswith(
        "rope_scaling = null, this model has {"
    )
    assert problems({"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}) == []


def test_kinds_of_layers() -> None:
    """A list that says nothing is none; but not where a family knows other kinds."""
    everywhere, turns = ["full_attention"] * 2, ["sliding_attention", "full_attention"]
    assert problems({"layer_types": None}, {"layer_types": everywhere}) == []
    assert problems({"layer_types": None}, {"layer_types": turns}) == [
        'layer_types = ["sliding_attention", "full_attention"], this model has null'
    ]
    assert problems({"layer_types": turns}, {}, layer_types=turns) == []
    assert problems({"layer_types": turns}, {"layer_types": everywhere}, layer_types=turns) == [
        'layer_types = ["full_attention", "full_attention"], this model has ["sliding_attention", "full_attention"]'
    ]
    assert problems({"layer_types": everywhere}, {}, layer_types=turns) == [
        'layer_types = ["sliding_attention", "full_attention"], this model has ["full_attention", "full_attention"]'
    ]


def test_names_of_fields() -> None:
    for ours in ("num_local_experts", "num_experts"):
        for theirs in ("num_local_experts", "num_experts"):
            assert problems({ours: 8}, {theirs: 8}) == []
            assert problems({ours: 8}, {theirs: 16}) == ["num_experts = 16, this model has 8"]
    assert problems({"hidden_size": 64}, {"hidden_size": 64}, head_dim=None) == []


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_a_part_of_a_head_is_not_the_whole(kind: str) -> None:
    """Wherever it is said: beside the table, as transformers 4 had it, or in it."""
    table = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
    written, said = ({"rope_scaling": table}, table) if kind == "llama3" else ({"rope_scaling": None}, None)
    for read in (
        {"rope_scaling": said, "partial_rotary_factor": 0.5},
        {"rope_scaling": {**(said or {}), "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", **(said or {}), "partial_rotary_factor": 0.5}},
    ):
        (problem,) = problems(written, read)
        assert problem.startswith("rope_scaling = {")
        assert '"partial_rotary_factor": 0.5' in problem
    assert problems(written, {"rope_scaling": said, "partial_rotary_factor": 1.0}) == []
