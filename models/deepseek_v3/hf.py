"""DeepSeek as Hugging Face writes it: names of tensors and config.json, of V2 and of V3. Torch-free.

A softmax router is V2's, a sigmoid one V3's: the model's kind and the fields of the router follow from it. Kimi K2's
files are V3's under another `model_type`, which transformers does not know; what is exported says V3.

Modules of multi-token prediction are further layers in published files. Each brings the embedding and the head along,
which are the model's own: written again on export, and compared on import. transformers' causal model leaves these
layers out. A model without them leaves out theirs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import OursAlone, Rename, Rule, StackExperts, TheirsAlone
from models.decoder.hf import (
    BLOCK,
    DEFAULTS,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    MATRICES,
    OURS,
    THEIRS,
    decoder,
    decoder_config,
    tied_head,
)
from models.deepseek_v3.args import DeepseekV3Args

_LATENT = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}
_MODULES = {
    **{ours: theirs for ours, theirs in BLOCK.items() if "norm" in ours},
    **{f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in _LATENT.items()},
    **FEED_FORWARD,
    "moe.router.gate": "mlp.gate",
    **{f"moe.shared.{ours}": f"mlp.shared_experts.{theirs}" for ours, theirs in MATRICES.items()},
}


def rules(args: DeepseekV3Args) -> tuple[Rule, ...]:
    """The table of names."""
    ahead = (rule for k in range(args.mtp_layers) for rule in _ahead(args, k))
    return decoder({}, *_block(args, OURS, THEIRS), *ahead, tied=args.tied_embeddings)


def _block(args: DeepseekV3Args, ours: str, theirs: str) -> Iterator[Rule]:
    for a, b in _MODULES.items():
        yield Rename(f"{ours}{a}.weight", f"{theirs}{b}.weight")
    for a, b in MATRICES.items():
        yield StackExperts(f"{ours}moe.experts.{a}", f"{theirs}mlp.experts.{{expert}}.{b}.weight")
    bias = f"{ours}moe.expert_bias"
    if args.experts.score == "sigmoid":
        yield Rename(bias, f"{theirs}mlp.gate.e_score_correction_bias", buffer=True)
    else:
        yield OursAlone(bias, "the selection bias of experts")


def _ahead(args: DeepseekV3Args, k: int) -> Iterator[Rule]:
    theirs = f"model.layers.{args.n_layers + k}."
    for name in ("enorm", "hnorm", "eh_proj"):
        yield Rename(f"mtp.{k}.{name}.weight", f"{theirs}{name}.weight")
    yield from _block(args, f"mtp.{k}.block.", theirs)
    yield Rename(f"mtp_norms.{k}.weight", f"{theirs}shared_head.norm.weight")


def extras(args: DeepseekV3Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides."""
    copies = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": EMBEDDING if args.tied_embeddings else HEAD}
    again = (
        TheirsAlone(f"model.layers.{args.n_layers + k}.{name}", same_as=same, written=True)
        for k in range(args.mtp_layers)
        for name, same in copies.items()
    )
    beyond = () if args.mtp_layers else (TheirsAlone(f"model.layers.{args.n_layers}."),)  # the published files' one
    return (*tied_head(args.tied_embeddings), *again, *beyond)


def to_config(args: DeepseekV3Args) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    experts, third = args.experts, args.experts.score == "sigmoid"
    grouped = "group_limited_greedy" if experts.top_groups < experts.groups else "greedy"
    said = {key: value for key, value in decoder_config(args).items() if key != "head_dim"}
    return {
        **said,
        "architectures": ["DeepseekV3ForCausalLM" if third else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        "num_key_value_heads": args.n_heads,
        "intermediate_size": args.ffn_hidden,
        "first_k_dense_replace": args.dense_layers,
        "moe_layer_freq": 1,
        "q_lora_rank": args.q_rank or None,
        "kv_lora_rank": args.kv_rank,
        "qk_nope_head_dim": args.nope_dim,
        "qk_rope_head_dim": args.rope_dim,
        "v_head_dim": args.v_dim,
        "moe_intermediate_size": experts.hidden,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "n_shared_experts": experts.shared_hidden // experts.hidden,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "topk_method": "noaux_tc" if third else grouped,
        "scoring_func": experts.score,
        "norm_topk_prob": experts.normalize,
        "routed_scaling_factor": experts.scale,
        "aux_loss_alpha": experts.balance_coefficient,
        "seq_aux": True,
        "num_nextn_predict_layers": args.mtp_layers,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Kimi K2's is V3's; what is null where it can be, in the number that it means."""
    kind = config.get("model_type")
    meant = {"model_type": "deepseek_v3" if kind == "kimi_k2" else kind}
    meant |= {key: config.get(key) or 1 for key in ("n_group", "topk_group") if key in config}
    meant |= {key: config[key] or 0 for key in ("n_shared_experts",) if key in config}
    return {**config, **meant, "q_lora_rank": config.get("q_lora_rank", 1536) or 0}


def defaults(args: DeepseekV3Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say."""
    third = args.experts.score == "sigmoid"
    own = {
        "vocab_size": 129280 if third else 102400,
        "hidden_size": 7168 if third else 4096,
        "intermediate_size": 18432 if third else 11008,
        "num_hidden_layers": 61 if third else 32,
        "num_attention_heads": 128 if third else 32,
        "first_k_dense_replace": 3 if third else 0,
        "moe_intermediate_size": 2048 if third else 1407,
        "n_routed_experts": 256 if third else 64,
        "num_experts_per_tok": 8 if third else None,
        "n_shared_experts": 1 if third else 2,
        "n_group": 8 if third else 1,
        "topk_group": 4 if third else 1,
        "topk_method": "noaux_tc" if third else "greedy",
        "scoring_func": "sigmoid" if third else "softmax",
        "norm_topk_prob": third,
        "routed_scaling_factor": 2.5 if third else 1.0,
    }
    same = {
        "kv_lora_rank": 512,
        "q_lora_rank": 0,  # see `normal`
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    return {**DEFAULTS, **own, **same, "head_dim": args.rope_dim, "moe_layer_freq": 1, "rope_interleave": True}


ADAPTER = Adapter(rules, to_config, defaults, extras, normal)
