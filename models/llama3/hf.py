"""Llama 3 as Hugging Face writes it: names of tensors and config.json. Torch-free.

Rotary embeddings pair elements here as they do there, so no rows are permuted. Meta's own files pair them otherwise,
and are converted by whoever publishes them for Hugging Face.
"""

from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import Rule, TheirsAlone
from models.decoder.hf import BLOCK, DEFAULTS, FEED_FORWARD, THEIRS, decoder, decoder_config, tied_head
from models.llama3.args import Llama3Args


def rules(args: Llama3Args) -> tuple[Rule, ...]:
    """The table of names."""
    return decoder({**BLOCK, **FEED_FORWARD}, tied=args.tied_embeddings)


def extras(args: Llama3Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model, and frequencies, which follow from config.json."""
    return (*tied_head(args.tied_embeddings), TheirsAlone(f"{THEIRS}self_attn.rotary_emb.inv_freq"))


def to_config(args: Llama3Args) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    return {**decoder_config(args), **kind, "intermediate_size": args.ffn_hidden}


def defaults(args: Llama3Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say."""
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    return {**DEFAULTS, **sizes, "mlp_bias": False}


ADAPTER = Adapter(rules, to_config, defaults, extras)
