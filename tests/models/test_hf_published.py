"""Files in the forms that are published, other than those of a plain model: with other parts beside the text model, and
quantized."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.runtime.errors import CheckpointError
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.deepseek_v3.args import FLAVORS as DEEPSEEK
from models.gpt_oss.args import experts as gpt_oss_experts
from tests.models.families import GEMMA3, GPT_OSS, LLAMA4, MISTRAL
from tests.models.hf_twins import build, export, load, our_logits, save, tokens_for
from tests.models.parity import adapter_of

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
WHOLES: dict[str, tuple[DecoderArgs, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (GEMMA3, {"model_type": "gemma3", "mm_tokens_per_image": 4}, {"model_type": "siglip_vision_model"}),
    "llama4": (
        LLAMA4,
        {"model_type": "llama4"},
        {
            "model_type": "llama4_vision_model",
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
    "mistral": (MISTRAL, {"model_type": "mistral3"}, {"model_type": "pixtral"}),
}


@pytest.mark.parametrize("family", WHOLES)
def test_the_text_model_of_a_whole_computes_the_same(family: str, tmp_path: Path) -> None:
    """As transformers writes one that sees images; and what we then export stands alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    args, whole, tower = WHOLES[family]
    adapter = adapter_of(family)
    text = json.loads(adapter.config_bytes(args, "float32"))
    whole = {**whole, "tie_word_embeddings": args.tied_embeddings}
    (tmp_path / "config").mkdir()
    config = {**whole, "text_config": text, "vision_config": {**TOWER, **tower}}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "config"))
    model.float().save_pretrained(tmp_path / "whole")
    ours = build(Decoder, args)
    load(tmp_path / "whole", ours, adapter, args)
    tokens = tokens_for(args)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)
        save(tmp_path, ours)
        alone = AutoModelForCausalLM.from_pretrained(export(tmp_path, adapter, args).path, dtype=torch.float32)
        torch.testing.assert_close(alone(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "whole" / "config.json").read_bytes())
    config["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"num_hidden_layers = {args.n_layers + 1}, this model has"):
        load(tmp_path / "whole", ours, adapter, args)


def in_fp8(value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix in FP8 with a factor for each block of 16 × 16, the last ones cut off; what it is."""
    scales = torch.rand([-(-length // 16) for length in value.shape]) * 0.1
    packed = (value * 10).to(torch.float8_e4m3fn)
    factors = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[: value.shape[0], : value.shape[1]]
    return {"": packed, "_scale_inv": scales}, packed.float() * factors


def in_mxfp4(value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Random experts' matrices of that shape (experts, in, out) in MXFP4; what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, inner, outer = value.shape
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 125, (experts, outer, inner // 32), dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


QUANTIZED: dict[str, tuple[DecoderArgs, Any, tuple[str, ...], dict[str, Any]]] = {
    "gpt_oss": (
        replace(GPT_OSS, dim=64, experts=gpt_oss_experts(3, 1, 32)),
        in_mxfp4,
        ("gate_up_proj", "down_proj"),
        {"quant_method": "mxfp4"},
    ),
    "deepseek_v3": (
        DEEPSEEK["debugmodel"],
        in_fp8,
        ("_proj.weight", "proj_with_mqa.weight"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]},
    ),
}


@pytest.mark.parametrize("family", QUANTIZED)
def test_quantized_files_are_what_they_stand_for(family: str, tmp_path: Path) -> None:
    args, quantize, ends, table = QUANTIZED[family]
    adapter = adapter_of(family)
    save(tmp_path, build(Decoder, args))
    plain = Path(export(tmp_path, adapter, args).path)
    packed = tmp_path / "packed"
    shutil.copytree(plain, packed, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copytree(packed, tmp_path / "want")
    files, want = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in load_file(plain / "model.safetensors").items():
        pieces, want[name] = quantize(value) if name.endswith(ends) else ({"": value}, value)
        files |= {f"{name}{end}": piece for end, piece in pieces.items()}
    assert len(files) > len(want)
    save_file(files, packed / "model.safetensors")
    save_file({name: value.contiguous() for name, value in want.items()}, tmp_path / "want" / "model.safetensors")
    config = json.loads((plain / "config.json").read_bytes())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
    one, other = (model_tensors([build(Decoder, args, seed)]) for seed in (1, 2))
    load_hf(str(tmp_path / "want"), one, adapter, args, Ranks(None))
    load_hf(str(packed), other, adapter, args, Ranks(None), quantized=True)
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert differ == []
