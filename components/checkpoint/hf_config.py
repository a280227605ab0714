"""config.json: what Hugging Face's files say of the model, and whether it is ours.

An adapter writes the config.json of a flavor in the form of published files; reading one is comparing it with what
would be written. So a new field needs one line, in one direction. Fields that say nothing about what the weights
compute (longest length, dropout, initialization, coefficient of the balance loss, cache) are not compared. Building our
arguments out of a config.json was rejected: the job says which flavor it trains, and a file that says otherwise must
not win in silence. Torch-free.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from components.checkpoint.names import Rule, Shapes, Table, TheirsAlone, apply_rules
from components.runtime.errors import CheckpointError

CONFIG = "config.json"
_MOST = 10_000
_ALIASES = {"num_local_experts": "num_experts"}  # transformers 5 → published files


@dataclass(frozen=True)
class Nested:
    """Published multimodal checkpoints in which the model is the text model, with a config.json of its own in
    `text_config`. They are read only: what is exported is the text model alone."""

    model_types: tuple[str, ...]
    """What the whole of it calls itself in config.json: ("gemma3",)."""
    prefixes: tuple[tuple[str, str], ...] = (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    )
    """What the text model's tensors begin with there, and by themselves; the first form is that of published files,
    the last that of transformers 5."""
    left_out: tuple[str, ...] = (
        "vision_tower.",
        "vision_model.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.vision_model.",
        "model.multi_modal_projector.",
    )
    """What the other parts' tensors begin with."""

    def text(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The text model's fields of a config.json, None if it is not in it; whether matrices are tied, the whole
        says."""
        if not isinstance(text := config.get("text_config"), dict):
            return None
        tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
        return {**text, **tied}

    def own_name(self, name: str) -> str:
        """The name that a tensor has where the text model stands alone."""
        return next((own + name.removeprefix(there) for there, own in self.prefixes if name.startswith(there)), name)


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
    nested: Nested | None = None
    """Multimodal checkpoints that hold the model; None: there are none."""

    def table(self, args: Any, shapes: Shapes) -> Table:
        """The table of a model of these arguments, whose tensors have these names and shapes. Raises
        CheckpointError."""
        return apply_rules(self.rules(args), self.extras(args), shapes)

    def config_bytes(self, args: Any, dtype: str, more: Mapping[str, Any] | None = None) -> bytes:
        """config.json, as it is written, for weights of that type ("bfloat16"). `more`: what else it says."""
        content = {**self.to_config(args), **(more or {}), "torch_dtype": dtype}
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    def config_problems(self, config: Mapping[str, Any], args: Any) -> list[str]:
        """Each field in which a config.json is not that of these arguments; a line each, empty if it is."""
        text = self.nested.text(config) if self.nested else None
        if text is not None and self.nested and (kind := config.get("model_type")) not in self.nested.model_types:
            return [f"model_type = {_show(kind)}, this model is in {' or '.join(self.nested.model_types)}"]
        defaults = self.defaults(args)
        theirs = _compared(self.normal(config if text is None else text), defaults)
        ours = _compared(self.to_config(args), defaults)
        return [
            f"{key} = {_show(theirs[key])}, this model has {_show(ours[key])}"
            for key in sorted(ours)
            if ours[key] != theirs[key]
        ]


def _compared(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `defaults`, as the config has them."""
    said = {_ALIASES.get(key, key): value for key, value in _flat_rope(config).items() if value is not None}
    defaults = {_ALIASES.get(key, key): value for key, value in defaults.items()}
    values = {**defaults, **{key: said[key] for key in defaults if key in said}}
    kinds = values.get("layer_types")
    if defaults.get("layer_types") is None and isinstance(kinds, list) and {*map(str, kinds)} == {"full_attention"}:
        values["layer_types"] = None  # of families that know no other, unless a file says so
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads", heads) is None:
        values["num_key_value_heads"] = heads
    if "head_dim" in values and values["head_dim"] is None:
        values["head_dim"] = _ratio(values.get("hidden_size"), heads)
    return values


def _show(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _ratio(a: Any, b: Any) -> Any:
    """The width of a head where a file does not say it; None where it says no usable numbers."""
    return a // b if type(a) is int and type(b) is int and b > 0 else None


def number_of(config: Mapping[str, Any], key: str, default: int) -> int:
    """How many layers or the like it says, for lists as long as that; the default where it says none, or no number that
    can be meant: nothing in a file is trusted, and what is wrong is told when fields are compared."""
    value = config.get(key)
    return value if type(value) is int and 0 < value <= _MOST else default


def _flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with `rope_theta` and `rope_scaling`: transformers 5 writes one table, `rope_parameters`."""
    flat = dict(config)
    rope = flat.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = dict(rope)
        flat["rope_theta"] = scaling.pop("rope_theta", flat.get("rope_theta"))
        flat["rope_scaling"] = scaling
    scaling = flat.get("rope_scaling")
    if (turned := flat.get("partial_rotary_factor")) is not None and isinstance(scaling, dict | None):
        scaling = {"partial_rotary_factor": turned, **(scaling or {})}
    if isinstance(scaling, dict):
        flat["rope_scaling"] = _scaling(scaling, flat.get("max_position_embeddings"))
    return flat


def _scaling(table: Mapping[str, Any], longest: Any) -> dict[str, Any] | None:
    """A table of rotary scaling with what transformers takes for what it does not say; None: there is none."""
    said = {key: value for key, value in table.items() if value is not None and key != "type"}
    kind = said.setdefault("rope_type", table.get("type") or "default")
    if said.get("partial_rotary_factor") == 1:
        del said["partial_rotary_factor"]
    if kind in ("llama3", "yarn"):
        said.setdefault("original_max_position_embeddings", longest)
    if kind == "default" and "partial_rotary_factor" not in said:
        return None
    return _yarn(said) if kind == "yarn" and _are_numbers(said) else said


def _are_numbers(said: Mapping[str, Any]) -> bool:
    return all(type(said.get(key, 1)) in (int, float) for key in ("factor", "mscale", "mscale_all_dim")) and (
        "factor" in said
    )


def _yarn(said: dict[str, Any]) -> dict[str, Any]:
    """YaRN's table with defaults. `mscale` says nothing but `attention_factor`, what cosines and sines are scaled
    with; `mscale_all_dim` is DeepSeek's scale of scores besides."""
    factor, mscale, everywhere = said["factor"], said.pop("mscale", None), said.pop("mscale_all_dim", None)

    def sharper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    implied = sharper(mscale) / sharper(everywhere) if mscale and everywhere else sharper(1.0)
    scale = said.pop("attention_factor", implied)
    return {
        **said,
        "beta_fast": said.get("beta_fast") or 32,
        "beta_slow": said.get("beta_slow") or 1,
        "truncate": said.get("truncate", True),
        "attention_factor": round(scale, 6) if isinstance(scale, float) else scale,
        **({"mscale_all_dim": everywhere} if everywhere else {}),
    }


def parse_config(raw: bytes) -> dict[str, Any]:
    """The fields of a config.json. Raises CheckpointError if it is no JSON object."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG} is not a JSON object")
    return config
