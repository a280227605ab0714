"""Gemma 3's text models as Hugging Face writes them: names of tensors and config.json. Torch-free.

1B is published as a text model; larger ones stand in files beside a vision tower, which is left out. config.json has
had three forms: a number that says how local and global blocks take turns, a list of each block's kind, and in
transformers 5 that list and a table of rotary positions by kind. What is written says it in the first two forms, so
that every version reads it; what is read may be any of the three.
"""

from collections.abc import Mapping
from typing import Any

from components.checkpoint.hf_config import Adapter, Nested, number_of
from components.checkpoint.names import Rule, TheirsAlone
from models.decoder.hf import BLOCK, DEFAULTS, FEED_FORWARD, QK_NORMS, decoder, decoder_config, tied_head
from models.gemma3.args import Gemma3Args

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
"""The norms of a block that have another name, or another place, than in other families."""
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def rules(args: Gemma3Args) -> tuple[Rule, ...]:
    """The table of names."""
    return decoder({**BLOCK, **_NORMS, **QK_NORMS, **FEED_FORWARD}, tied=args.tied_embeddings)


def extras(args: Gemma3Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model."""
    return tied_head(args.tied_embeddings)


def to_config(args: Gemma3Args) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    return {
        **{key: value for key, value in decoder_config(args).items() if key != "hidden_act"},
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "intermediate_size": args.ffn_hidden,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": args.local_theta,
        "sliding_window": args.sliding_window,
        "sliding_window_pattern": args.pattern,
        "layer_types": [LOCAL if args.is_local(layer) else GLOBAL for layer in range(args.n_layers)],
        "query_pre_attn_scalar": args.query_pre_attn_scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "pad_token_id": None,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Any of the three forms in that which `to_config` writes, and what only the newest can say of local blocks."""
    found, kinds = dict(config), config.get("layer_types")
    if kinds is None:
        pattern, count = number_of(config, "sliding_window_pattern", 6), number_of(config, "num_hidden_layers", 26)
        found["layer_types"] = [GLOBAL if (layer + 1) % pattern == 0 else LOCAL for layer in range(count)]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and {LOCAL, GLOBAL} & {*rope}:
        del found["rope_parameters"]
        tables = (rope.get(kind) for kind in (GLOBAL, LOCAL))
        everywhere, local = (dict(table) if isinstance(table, dict) else {} for table in tables)
        found |= {"rope_theta": everywhere.pop("rope_theta", None), "rope_scaling": everywhere}
        found |= {"rope_local_base_freq": local.pop("rope_theta", None)}
        found |= {"rope_local_scaling": None if local.get("rope_type", "default") == "default" else local}
    return found


def defaults(args: Gemma3Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say; None: that it does not say it."""
    said = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
    }
    absent = ("layer_types", "rope_local_scaling", "attn_logit_softcapping", "final_logit_softcapping")
    return {**{key: value for key, value in DEFAULTS.items() if key != "hidden_act"}, **said, **dict.fromkeys(absent)}


ADAPTER = Adapter(rules, to_config, defaults, extras, normal, Nested(("gemma3",)))
