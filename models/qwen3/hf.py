"""Qwen3 as Hugging Face writes it: names of tensors and config.json, dense and with experts. Torch-free.

Published files hold each expert's matrices by themselves; transformers 5 stacks them once it has read them. The
selection bias has no place there: it chooses experts in training and, being kept out of an export, is the one thing in
which an exported model may choose otherwise than ours.
"""

from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import OursAlone, Rename, Rule, StackExperts, TheirsAlone
from models.decoder.hf import (
    BLOCK,
    DEFAULTS,
    FEED_FORWARD,
    MATRICES,
    OURS,
    QK_NORMS,
    THEIRS,
    decoder,
    decoder_config,
    tied_head,
)
from models.qwen3.args import Qwen3Args

_BLOCK = {**BLOCK, **QK_NORMS}


def rules(args: Qwen3Args) -> tuple[Rule, ...]:
    """The table of names."""
    if args.experts is None:
        return decoder({**_BLOCK, **FEED_FORWARD}, tied=args.tied_embeddings)
    experts = (
        Rename(f"{OURS}moe.router.gate.weight", f"{THEIRS}mlp.gate.weight"),
        *(
            StackExperts(f"{OURS}moe.experts.{a}", f"{THEIRS}mlp.experts.{{expert}}.{b}.weight")
            for a, b in MATRICES.items()
        ),
        OursAlone(f"{OURS}moe.expert_bias", "the selection bias of experts"),
    )
    return decoder(_BLOCK, *experts, tied=args.tied_embeddings)


def extras(args: Qwen3Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model."""
    return tied_head(args.tied_embeddings)


def to_config(args: Qwen3Args) -> dict[str, Any]:
    """config.json, without the type of the weights."""
    experts = args.experts
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": args.ffn_hidden}
    if experts is not None:
        kind = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": 3 * args.dim,  # of blocks without experts, of which there are none
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": experts.hidden,
            "num_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "norm_topk_prob": experts.normalize,
            "router_aux_loss_coef": experts.balance_coefficient,
        }
    return {**decoder_config(args), **kind, "use_sliding_window": False, "sliding_window": None}


def defaults(args: Qwen3Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say; None: that it does not say it."""
    dense = {"intermediate_size": 22016, "num_experts": None}
    sparse = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }
    sizes = {
        "vocab_size": 151936,
        "hidden_size": 4096 if args.experts is None else 2048,
        "num_hidden_layers": 32 if args.experts is None else 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32 if args.experts is None else 4,
        "head_dim": 128 if args.experts is None else None,  # None: hidden_size / num_attention_heads
    }
    window = {"use_sliding_window": False, "layer_types": None}
    return {**DEFAULTS, **sizes, **window, **(dense if args.experts is None else sparse)}


ADAPTER = Adapter(rules, to_config, defaults, extras)
