"""What families share of Hugging Face's files: names of a decoder's tensors, and fields of its config.json.
Torch-free.

A family adds what its blocks have besides. Names that only one family has stand with that family. A line of the table
that finds no tensor of ours says nothing, so that one table serves blocks of several kinds.
"""

from collections.abc import Mapping
from typing import Any

from components.checkpoint.names import OursAlone, Rename, Rule, TheirsAlone
from components.layers.shapes import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from models.decoder.args import DecoderArgs

OURS, THEIRS = "layers.{layer}.", "model.layers.{layer}."
"""What the names in a block begin with."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Modules of every block: ours → theirs."""
QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
"""Where queries and keys are normed."""
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Of a feed-forward with a gate."""
FEED_FORWARD = {f"feed_forward.{ours}": f"mlp.{theirs}" for ours, theirs in MATRICES.items()}
"""Modules of a dense block."""
_IN_BLOCK = (
    *("attention", "attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "feed_forward"),
    *("moe.router", "moe.experts", "moe.shared"),
)
_IN_MODULE = ("enorm", "hnorm", "eh_proj", *(f"block.{name}" for name in _IN_BLOCK))
_AHEAD = (
    *(
        OursAlone(f"{name}.", "modules of multi-token prediction", buffer=False)
        for name in ("mtp_norms", *(f"mtp.{{layer}}.{part}" for part in _IN_MODULE))
    ),
    OursAlone("mtp.{layer}.block.moe.expert_bias", "the selection bias of experts"),
)
"""What any decoder can have besides, and few families' files have a place for."""


def decoder(modules: Mapping[str, str], *more: Rule, tied: bool) -> tuple[Rule, ...]:
    """The table of a whole decoder, in the order of the model. `modules`: those in each block that have a weight;
    `more`: what else is in it; `tied`: there is no head of its own."""
    head = () if tied else (Rename("output.weight", HEAD),)
    ahead = () if any(name.startswith("mtp.") for rule in more for name in rule.our_names) else _AHEAD
    blocks = [Rename(f"{OURS}{ours}.weight", f"{THEIRS}{theirs}.weight") for ours, theirs in modules.items()]
    return (
        Rename("tok_embeddings.weight", EMBEDDING),
        *blocks,
        *more,
        Rename("norm.weight", "model.norm.weight"),
        *head,
        *ahead,
    )


def tied_head(tied: bool) -> tuple[TheirsAlone, ...]:
    """The head that published files of a tied model may hold besides: it must be the embedding."""
    return (TheirsAlone(HEAD, same_as=EMBEDDING),) if tied else ()


def decoder_config(args: DecoderArgs) -> dict[str, Any]:
    """The fields of config.json that all decoders have."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope_config(args.rope_scaling),
        "attention_bias": False,
        "tie_word_embeddings": args.tied_embeddings,
        "bos_token_id": None,  # the tokenizer's, which a model's shape does not say
        "eos_token_id": None,
    }


DEFAULTS: Mapping[str, Any] = {
    "model_type": None,
    "num_key_value_heads": None,  # as many as queries
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
"""What transformers takes for such a field that a config.json does not say, where families agree; None: that it does
not say it."""


def rope_config(scaling: Scaling | None) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return None if scaling is None else _yarn(scaling)


def _yarn(scaling: YarnScaling) -> dict[str, Any]:
    said = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    absent = {"mscale": None, "mscale_all_dim": None, "truncate": True}
    return {key: value for key, value in said.items() if key not in absent or value != absent[key]}
