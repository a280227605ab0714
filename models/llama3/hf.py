"""Llama 3 as Hugging Face writes it: names of tensors and config.json. Torch-free.

Rotary embeddings pair elements here as they do there, so no rows are permuted. Meta's own files pair them otherwise,
and are converted by whoever publishes them for Hugging Face.
"""

from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import Rule, TheirsAlone
from models.hf_names import BLOCK, FEED_FORWARD, THEIRS, decoder, tied_head
from models.llama3.args import Llama3Args


def rules(args: Llama3Args) -> tuple[Rule, ...]:
    """The table of names."""
    return decoder({**BLOCK, **FEED_FORWARD}, tied=args.tied_embeddings)


def extras(args: Llama3Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model, and frequencies, which follow from config.json."""
    return (*tied_head(args.tied_embeddings), TheirsAlone(f"{THEIRS}self_attn.rotary_emb.inv_freq"))


def to_config(args: Llama3Args) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    scaling = args.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_hidden,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": args.tied_embeddings,
        "bos_token_id": None,  # the tokenizer's, which a model's shape does not say
        "eos_token_id": None,
    }


def defaults(args: Llama3Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say."""
    return {
        "model_type": None,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as queries
        "head_dim": None,  # hidden_size / num_attention_heads
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


ADAPTER = Adapter(rules, to_config, defaults, extras)
