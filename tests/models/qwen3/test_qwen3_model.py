"""Qwen3's initialization, and what its experts count; what it computes, `tests/models/test_parity.py` says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from components.layers.initialize import initialize
from components.layers.shapes import ExpertsShape
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.qwen3.args import Qwen3Args

DENSE = Qwen3Args(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, head_dim=12, vocab_size=64)
EXPERTS = ExpertsShape(count=6, per_token=2, hidden=20)
MOE = replace(DENSE, ffn_hidden=0, experts=EXPERTS)
CASES = {"dense": DENSE, "experts": MOE}


def build(args: Qwen3Args, seed: int = 0) -> Decoder:
    model = Decoder(args)
    initialize(model, model.inits(), seed)
    return model


def random_batch(args: DecoderArgs, rows: int = 2, seq: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    data = torch.randint(0, args.vocab_size, (rows, seq + 1), generator=torch.Generator().manual_seed(1))
    return data[:, :-1], data[:, 1:], torch.arange(seq).expand(rows, seq)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_an_init(case: str) -> None:
    model = Decoder(CASES[case])
    assert set(model.inits()) == {name for name, _ in model.named_parameters()}


def test_counts_are_kept_in_training_only() -> None:
    model = build(replace(MOE, experts=replace(EXPERTS, bias_rate=0.1)))
    tokens, labels, positions = random_batch(MOE)
    model(tokens, positions)
    counts = [layer.get_buffer("moe.tokens_per_expert") for layer in model.layers.children()]
    assert [int(count.sum()) for count in counts] == [0, 0]
    for _ in range(2):
        model(tokens, positions, None, (labels > 10) / labels.numel())
    assert [int(count.sum()) for count in counts] == [2 * 2 * int((labels > 10).sum())] * 2
