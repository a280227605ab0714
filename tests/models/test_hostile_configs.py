"""config.json of strangers: whatever a field holds, it is compared and told, and neither crashes nor takes long."""

from typing import Any

import pytest

from models.train_spec import families
from tests.models.families import FAMILIES
from tests.models.parity import adapter_of

ODD: tuple[Any, ...] = (
    "x",
    [],
    ["x"],
    {},
    -1,
    0,
    float("inf"),
    2.5,
    True,
    10**30,
    {"rope_type": ["x"], "factor": 2},
    {"rope_type": "yarn", "factor": 0, "mscale": 1},
    {"sliding_attention": 3, "full_attention": [1]},
    {"full_attention": "x"},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values_are_told(family: str) -> None:
    adapter, args = adapter_of(family), next(iter(families.lookup(family).flavors.values()))
    own, defaults = adapter.to_config(args), adapter.defaults(args)
    assert adapter.config_problems(own, args) == []
    free = {"layer_types", "moe_layers", "no_rope_layers"}  # they may follow from others
    for base in (own, {key: value for key, value in own.items() if key not in free}):
        for key in {*own, *defaults, "rope_parameters", "partial_rotary_factor"}:
            for value in ODD:
                problems = adapter.config_problems({**base, key: value}, args)
                if key in {"hidden_size", "num_hidden_layers", "vocab_size", "model_type"}:
                    assert any(line.startswith(f"{key} = ") for line in problems), (key, value)
    for key in ("text_config", "quantization_config"):
        for value in ODD:
            adapter.config_problems({**own, key: value}, args)
