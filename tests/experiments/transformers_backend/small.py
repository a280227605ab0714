"""Small random models of transformers, written as a user has them: a folder with config.json."""

import json
from pathlib import Path
from typing import Any

import torch

from components.layers.initialize import initialize
from experiments.transformers_backend.args import HFArgs
from experiments.transformers_backend.build import body_name, hf_config
from experiments.transformers_backend.model import HFModel
from trainer.build import materialize, zero_buffers

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama_tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2": SIZES,
    "mistral": {**SIZES, "sliding_window": 5},
    "olmo2": SIZES,
    "gemma2": {
        **SIZES,
        "head_dim": 8,
        "sliding_window": 5,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {**SIZES, "head_dim": 8},
    "stablelm": {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0},  # ships no plan
    "olmo": SIZES,  # norms without weights
    "cohere": SIZES,  # scales its logits
    "gpt2": {
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt_neox": NEOX,
    "qwen3_moe": {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def folder(path: Path, name: str, **fields: Any) -> str:
    """Write one of them, with other fields besides; the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": name, **CONFIGS[name], **fields}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def build(args: HFArgs, seed: int = 3) -> HFModel:
    """The model with its first values, as the Trainer builds it."""
    with torch.device("meta"):
        model = HFModel(args)
    materialize(model, "cpu")
    zero_buffers(model, "cpu")
    initialize(model, model.inits(), seed)
    return model


def theirs(args: HFArgs, model: HFModel) -> tuple[Any, dict[str, str]]:
    """transformers' own model with the same weights and its own attention, and its names by ours."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(hf_config(args), attn_implementation="eager").train()
    head = next(name for name, module in other.named_modules() if module is other.get_output_embeddings())
    body = {name: name.replace("model.", f"{body_name(other)}.", 1) for name in model.state_dict()}
    names = {name: name.replace("output.", f"{head}.", 1) if name[:7] == "output." else to for name, to in body.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            other.get_parameter(names[name]).copy_(parameter)
    return other, names
