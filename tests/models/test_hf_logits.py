"""What is imported computes what transformers computes from the same files, and what is exported comes back byte for
byte. That transformers computes from our exports what we do, `test_parity.py` shows with every gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hf_config import Adapter
from components.checkpoint.state import model_tensors
from components.data.tokenizer import load_tokenizer
from components.layers.shapes import ExpertsShape, Llama3Scaling
from models.decoder.model import Decoder
from models.llama3.args import FLAVORS, Llama3Args
from models.llama3.hf import ADAPTER as LLAMA3
from models.qwen3.args import Qwen3Args
from models.qwen3.hf import ADAPTER as QWEN3
from scripts.checkpoint import main
from tests.models.hf_twins import build, export, load, our_logits, save, tokens_for

LLAMA = Llama3Args(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=64, rope_theta=1e4)
DENSE = Qwen3Args(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, head_dim=10, vocab_size=64, rope_theta=1e4
)
MOE = replace(DENSE, ffn_hidden=0, experts=ExpertsShape(count=5, per_token=2, hidden=12))
CASES: dict[str, tuple[Any, Any, Adapter]] = {
    "llama 3": (Decoder, LLAMA, LLAMA3),
    "llama 3.1": (Decoder, replace(LLAMA, rope_scaling=Llama3Scaling(8.0, original_max_position=16)), LLAMA3),
    "llama 3.2": (
        Decoder,
        replace(LLAMA, tied_embeddings=True, rope_scaling=Llama3Scaling(32.0, original_max_position=16)),
        LLAMA3,
    ),
    "qwen3": (Decoder, DENSE, QWEN3),
    "qwen3 tied": (Decoder, replace(DENSE, tied_embeddings=True), QWEN3),
    "qwen3 moe": (Decoder, MOE, QWEN3),
    "qwen3 moe unnormalized": (Decoder, replace(MOE, experts=ExpertsShape(5, 2, 12, normalize=False)), QWEN3),
}


@pytest.mark.parametrize("name", CASES)
def test_an_import_computes_the_same(name: str, tmp_path: Path) -> None:
    """From what `save_pretrained` writes, of a model that transformers initialized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_cls, args, adapter = CASES[name]
    torch.manual_seed(3)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes(adapter.config_bytes(args, "float32"))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "config"), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8kB")
    ours = build(model_cls, args, seed=1)
    load(tmp_path / "theirs", ours, adapter, args)
    tokens = tokens_for(args)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_keeps_every_byte(name: str, tmp_path: Path) -> None:
    model_cls, args, adapter = CASES[name]
    ours, again = build(model_cls, args), build(model_cls, args, seed=1)
    save(tmp_path, ours)
    load(export(tmp_path, adapter, args, shard_bytes=8_000).path, again, adapter, args)
    before, after = ours.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in before)


def test_the_tool_exports_weights_and_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`scripts/checkpoint.py export` of a checkpoint that says of which model it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = build(Decoder, FLAVORS["debugmodel"])
    job = JobIdentity({"model.name": "llama3", "model.flavor": "debugmodel"})
    store = Checkpointer(tmp_path / "checkpoint", keep_latest_k=0, group=None)
    store.save_model(7, model_tensors([ours]), job, torch.float32)
    out, assets = tmp_path / "out", "tests/assets/tokenizer"
    assert main(["export", str(tmp_path / "checkpoint/step-7"), str(out), "--assets", assets]) == 0
    assert capsys.readouterr().out == f"{out}/step-7\n"
    theirs, info = AutoModelForCausalLM.from_pretrained(out / "step-7", output_loading_info=True, dtype=torch.float32)
    assert {key: [*value] for key, value in info.items() if value} == {}
    text = "def f(x):\n    return"
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "step-7")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == load_tokenizer(assets).encode(text)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
