"""Mistral as Hugging Face writes it: names of tensors, which are Llama's, and config.json. Torch-free."""

from collections.abc import Mapping
from typing import Any

from components.checkpoint.hf_config import Adapter, Nested
from components.checkpoint.names import Rule, TheirsAlone
from models.decoder.hf import BLOCK, DEFAULTS, FEED_FORWARD, decoder, decoder_config, tied_head
from models.mistral.args import MistralArgs


def rules(args: MistralArgs) -> tuple[Rule, ...]:
    """The table of names."""
    return decoder({**BLOCK, **FEED_FORWARD}, tied=args.tied_embeddings)


def extras(args: MistralArgs) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model."""
    return tied_head(args.tied_embeddings)


def to_config(args: MistralArgs) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": args.sliding_window}
    return {**decoder_config(args), **kind, "intermediate_size": args.ffn_hidden}


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A file that says nothing of a window has one; one that says null has none."""
    return {**config, "sliding_window": config.get("sliding_window", 4096)}


def defaults(args: MistralArgs) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say."""
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return {**DEFAULTS, **sizes, "sliding_window": None, "layer_types": None}


ADAPTER = Adapter(rules, to_config, defaults, extras, normal, Nested(("mistral3",)))
