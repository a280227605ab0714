"""A model of transformers from its config.json, without values, without the network, and without code of others."""

from typing import Any

import torch

from components.runtime.errors import ConfigError
from experiments.transformers_backend.args import CONFIG, HFArgs
from experiments.transformers_backend.attention import register


def hf_config(args: HFArgs) -> Any:
    """The configuration as transformers reads it. Raises ConfigError for a model_type that it does not know."""
    register()
    from transformers import CONFIG_MAPPING

    fields = args.config
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise refusal(args, f"the installed transformers knows no model_type {kind!r}; code beside it is not run")
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # their code checks fields, each in its own way
        raise refusal(args, f"transformers refuses it: {error}") from error


def hf_model(args: HFArgs, attention: str) -> Any:
    """The model on the current device, its parameters of the current default type. Raises ConfigError."""
    config = hf_config(args)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is not config:
        raise refusal(args, f"{config.model_type} is not a plain causal language model")
    if args.config.get("quantization_config") is not None:
        raise refusal(args, "quantization_config is there, but quantized weights cannot be trained")
    dtype = torch.get_default_dtype()
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except Exception as error:  # their code checks what it is given, each model in its own way
        if error.args == (attention,):
            raise refusal(args, f"{config.model_type} computes attention of its own, across documents") from error
        raise refusal(args, f"transformers cannot build {config.model_type}: {error}") from error


def body_name(model: Any) -> str:
    """What a causal language model calls its body, all but the head. Not all have it where they say."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"


def refusal(args: HFArgs, why: str) -> ConfigError:
    """That a model cannot be trained."""
    return ConfigError(f"model.flavor = {args.folder!r}: {CONFIG}: {why}")
