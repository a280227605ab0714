"""Llama 4 as Hugging Face writes it: names of tensors and config.json. Torch-free.

An expert's first two matrices are one there, and all of an expert's are transposed. Neighbours are paired in rotary
embeddings, as here, so no rows are permuted. Published files hold a model that sees images, whose language model is a
part with a prefix of its own (`nested`); what is exported is the language model alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from components.checkpoint.hf_config import Adapter, Nested, number_of
from components.checkpoint.names import Merge, OursAlone, Rename, Rule
from components.layers.shapes import Temperature
from models.decoder.hf import BLOCK, DEFAULTS, MATRICES, OURS, THEIRS, decoder, decoder_config
from models.llama4.args import FLAVORS, Llama4Args

_DENSE = {f"feed_forward.{ours}": f"feed_forward.{theirs}" for ours, theirs in MATRICES.items()}
_SHARED = {f"moe.shared.{ours}": f"feed_forward.shared_expert.{theirs}" for ours, theirs in MATRICES.items()}


def rules(args: Llama4Args) -> tuple[Rule, ...]:
    """The table of names."""
    ours, theirs = f"{OURS}moe.experts.", f"{THEIRS}feed_forward.experts."
    return decoder(
        {**BLOCK, **_DENSE, **_SHARED, "moe.router.gate": "feed_forward.router"},
        Merge((f"{ours}w1", f"{ours}w3"), f"{theirs}gate_up_proj", dim=1, transposed=True),
        Rename(f"{ours}w2", f"{theirs}down_proj", transposed=True),
        OursAlone(f"{OURS}moe.expert_bias", "the selection bias of experts"),
        tied=args.tied_embeddings,
    )


def to_config(args: Llama4Args) -> dict[str, Any]:
    """config.json of the language model, without the type of the weights."""
    experts, temperature = args.experts, args.temperature or Temperature()
    layers = range(args.n_layers)
    turned = [int(args.has_positions(layer)) for layer in layers]  # 1: with positions, whatever the field's name says
    return {
        **decoder_config(args),
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": experts.hidden,
        "intermediate_size_mlp": args.ffn_hidden,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "router_aux_loss_coef": experts.balance_coefficient,
        "interleave_moe_layer_step": args.experts_every,
        "moe_layers": [layer for layer in layers if args.has_experts(layer)],
        "no_rope_layer_interval": args.plain_every,
        "no_rope_layers": turned,
        "layer_types": _layer_types(turned),
        "attention_chunk_size": args.chunk,
        "use_qk_norm": args.qk_norm,
        "attn_temperature_tuning": args.temperature is not None,
        "floor_scale": temperature.floor,
        "attn_scale": temperature.scale,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the lists that follow from intervals where it does not say them, or, as the first published files,
    says empty ones; those files also say 4 for true."""
    layers = range(number_of(config, "num_hidden_layers", 48))
    every, step = number_of(config, "no_rope_layer_interval", 4), number_of(config, "interleave_moe_layer_step", 1)
    said = config.get("no_rope_layers")
    turned = said if isinstance(said, list) and said else [int((layer + 1) % every != 0) for layer in layers]
    experts = config.get("moe_layers")
    return {
        **config,
        "moe_layers": [*layers][step - 1 :: step] if experts is None else experts,
        "no_rope_layers": said or turned,
        "layer_types": config.get("layer_types") or _layer_types(turned),
        "attn_temperature_tuning": bool(config.get("attn_temperature_tuning", True)),
    }


def _layer_types(turned: Sequence[int]) -> list[str]:
    return ["chunked_attention" if turns else "full_attention" for turns in turned]


def defaults(args: Llama4Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say: Scout's, but for the frequencies."""
    said = to_config(FLAVORS["17bx16e"])
    shown = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts_per_tok",
        "moe_layers",
        "no_rope_layers",
        "layer_types",
        "rms_norm_eps",
        "rope_theta",
        "attention_chunk_size",
        "use_qk_norm",
        "attn_temperature_tuning",
        "floor_scale",
        "attn_scale",
    )
    return {**DEFAULTS, **{key: said[key] for key in shown}, "num_experts": said["num_local_experts"]}


ADAPTER = Adapter(rules, to_config, defaults, normal=normal, nested=Nested(("llama4",)))
