"""config.json: what Hugging Face's files say of the model, and whether it is ours.

An adapter writes the config.json of a flavor in the form of published files; reading one is comparing it with what
would be written. So a new field needs one line, in one direction. Fields that say nothing about what the weights
compute (longest length, dropout, initialization, coefficient of the balance loss, cache) are not compared. Building our
arguments out of a config.json was rejected: the job says which flavor it trains, and a file that says otherwise must
not win in silence. Torch-free.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from components.checkpoint.names import Rule, Shapes, Table, TheirsAlone, apply_rules
from components.runtime.errors import CheckpointError

CONFIG = "config.json"
_ALIASES = {"num_local_experts": "num_experts"}  # transformers 5 → published files


@dataclass(frozen=True)
class Adapter:
    """How a family's weights and flavors are written by Hugging Face."""

    rules: Callable[[Any], tuple[Rule, ...]]
    """Arguments → the table of names; torch-free, names without the part (`layers.0.…`, not `model.layers.0.…`)."""
    to_config: Callable[[Any], dict[str, Any]]
    """Arguments → config.json, without the type of the weights."""
    defaults: Callable[[Any], Mapping[str, Any]]
    """Arguments → the fields that are compared, each with what transformers takes where a file does not say it."""
    extras: Callable[[Any], tuple[TheirsAlone, ...]] = lambda args: ()
    """Arguments → what published files may hold besides."""
    normal: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    """config.json of theirs → the same in the form that `to_config` writes, where published files have several."""

    def table(self, args: Any, shapes: Shapes) -> Table:
        """The table of a model of these arguments, whose tensors have these names and shapes. Raises
        CheckpointError."""
        return apply_rules(self.rules(args), self.extras(args), shapes)

    def config_bytes(self, args: Any, dtype: str) -> bytes:
        """config.json, as it is written, for weights of that type ("bfloat16")."""
        return (json.dumps({**self.to_config(args), "torch_dtype": dtype}, indent=2, sort_keys=True) + "\n").encode()

    def config_problems(self, config: Mapping[str, Any], args: Any) -> list[str]:
        """Each field in which a config.json is not that of these arguments; a line each, empty if it is."""
        defaults = self.defaults(args)
        ours, theirs = _compared(self.to_config(args), defaults), _compared(self.normal(config), defaults)
        problems = [
            f"{key} = {_show(theirs[key])}, this model has {_show(ours[key])}"
            for key in sorted(ours)
            if ours[key] != theirs[key]
        ]
        if config.get("quantization_config") is not None:
            problems.append(
                "quantization_config is there: quantized weights (checkpoint.initial_load_in_hf_quantized) are not read"
            )
        return problems


def _compared(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `defaults`, as the config has them."""
    said = {_ALIASES.get(key, key): value for key, value in _flat_rope(config).items() if value is not None}
    if isinstance(kinds := said.get("layer_types"), list) and all(kind == "full_attention" for kind in kinds):
        del said["layer_types"]
    values = {**defaults, **{key: said[key] for key in defaults if key in said}}
    heads = values["num_attention_heads"]
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        values["head_dim"] = _ratio(values["hidden_size"], heads)
    return values


def _show(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _ratio(a: Any, b: Any) -> Any:
    """The width of a head where a file does not say it; None where it says no usable numbers."""
    return a // b if type(a) is int and type(b) is int and b > 0 else None


def _flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with `rope_theta` and `rope_scaling`: transformers 5 writes one table, `rope_parameters`."""
    flat = dict(config)
    rope = flat.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = dict(rope)
        flat["rope_theta"] = scaling.pop("rope_theta", flat.get("rope_theta"))
        flat["rope_scaling"] = scaling
    scaling = flat.get("rope_scaling")
    if isinstance(scaling, dict):
        scaling = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
        flat["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return flat


def parse_config(raw: bytes) -> dict[str, Any]:
    """The fields of a config.json. Raises CheckpointError if it is no JSON object."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG} is not a JSON object")
    return config
