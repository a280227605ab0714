"""GPT-OSS as Hugging Face writes it: names of tensors and config.json. Torch-free.

An expert's first two matrices are one there, whose columns take turns, and all of an expert's are transposed. Published
files hold these matrices in MXFP4, as blocks and scales; what is exported is not quantized.
"""

from collections.abc import Mapping
from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import Merge, OursAlone, Rename, Rule
from components.layers.shapes import CLAMP, SLOPE
from models.decoder.hf import BLOCK, DEFAULTS, OURS, THEIRS, decoder, decoder_config
from models.gpt_oss.args import FLAVORS, GptOssArgs

_BIASED = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "moe.router.gate": "mlp.router",
}


def rules(args: GptOssArgs) -> tuple[Rule, ...]:
    """The table of names."""
    ours, theirs = f"{OURS}moe.experts.", f"{THEIRS}mlp.experts."
    return decoder(
        {**BLOCK, **_BIASED},
        *(Rename(f"{OURS}{a}.bias", f"{THEIRS}{b}.bias") for a, b in _BIASED.items()),
        Rename(f"{OURS}attention.sinks", f"{THEIRS}self_attn.sinks"),
        Merge((f"{ours}w1", f"{ours}w3"), f"{theirs}gate_up_proj", dim=1, interleaved=True, transposed=True),
        Merge((f"{ours}b1", f"{ours}b3"), f"{theirs}gate_up_proj_bias", dim=1, interleaved=True),
        Rename(f"{ours}w2", f"{theirs}down_proj", transposed=True),
        Rename(f"{ours}b2", f"{theirs}down_proj_bias"),
        OursAlone(f"{OURS}moe.expert_bias", "the selection bias of experts"),
        tied=args.tied_embeddings,
    )


def to_config(args: GptOssArgs) -> dict[str, Any]:
    """config.json, without the type of the weights. As published, some fields have two names."""
    experts = args.experts
    return {
        **decoder_config(args),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": experts.hidden,
        "attention_bias": True,
        "sliding_window": args.window,
        "layer_types": _layer_types(args),
        "initial_context_length": args.rope_scaling.original_max_position,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "experts_per_token": experts.per_token,
        "router_aux_loss_coef": experts.balance_coefficient,
        "swiglu_limit": CLAMP,
    }


def defaults(args: GptOssArgs) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say: the larger model's."""
    said = to_config(FLAVORS["120b"])
    shown = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts_per_tok",
        "rms_norm_eps",
        "rope_theta",
        "attention_bias",
        "sliding_window",
        "swiglu_limit",
    )
    more = {"swiglu_alpha": SLOPE, "num_experts": said["num_local_experts"], "layer_types": _layer_types(args)}
    return {**DEFAULTS, **{key: said[key] for key in shown}, **more}


def _layer_types(args: GptOssArgs) -> list[str]:
    return ["full_attention" if block.attention.reach.window is None else "sliding_attention" for block in args.blocks]


def normal(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the family's scaling of rotary frequencies where it says none: there is no plain form."""
    said = any(config.get(key) for key in ("rope_scaling", "rope_parameters"))
    return config if said else {**config, "rope_scaling": to_config(FLAVORS["120b"])["rope_scaling"]}


ADAPTER = Adapter(rules, to_config, defaults, normal=normal)
