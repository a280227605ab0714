"""Our decoder computes what transformers' Qwen3 and Qwen3Moe compute."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.initialize import initialize
from components.layers.shapes import ExpertsShape
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.qwen3.args import Qwen3Args

DENSE = Qwen3Args(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, head_dim=12, vocab_size=64)
EXPERTS = ExpertsShape(count=6, per_token=2, hidden=20)
MOE = replace(DENSE, ffn_hidden=0, experts=EXPERTS)
CASES = {
    "dense": DENSE,
    "tied": replace(DENSE, tied_embeddings=True),
    "experts": MOE,
    "experts, weights as they are": replace(MOE, experts=ExpertsShape(6, 3, 20, normalize=False)),
}
# ours → transformers', inside a block
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "moe.router.gate": "mlp.gate",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def build(args: Qwen3Args, seed: int = 0) -> Decoder:
    model = Decoder(args)
    initialize(model, model.inits(), seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # else a norm that is left out would not show
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_batch(args: DecoderArgs, rows: int = 2, seq: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    data = torch.randint(0, args.vocab_size, (rows, seq + 1), generator=torch.Generator().manual_seed(1))
    return data[:, :-1], data[:, 1:], torch.arange(seq).expand(rows, seq)


def theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under transformers' names: w1 and w3 of the experts are one tensor there."""
    top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    found = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if module in top:
            found[f"{top[module]}.weight"] = value
            continue
        _, number, inner = module.split(".", 2)
        prefix = f"model.layers.{number}"
        if inner in NAMES:
            found[f"{prefix}.{NAMES[inner]}.weight"] = value
        elif inner == "moe.experts.w1":
            both = torch.cat((value, tensors[name.replace("w1", "w3")]), dim=1)
            found[f"{prefix}.mlp.experts.gate_up_proj"] = both
        elif inner == "moe.experts.w2":
            found[f"{prefix}.mlp.experts.down_proj"] = value
    return found


def transformers_twin(model: Decoder) -> torch.nn.Module:
    """transformers' model with the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    args = model.args
    shape: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "tie_word_embeddings": args.tied_embeddings,
        "use_cache": False,
    }
    if args.experts is None:
        twin: torch.nn.Module = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=args.ffn_hidden)).float()
    else:
        config = Qwen3MoeConfig(
            **shape,
            num_experts=args.experts.count,
            num_experts_per_tok=args.experts.per_token,
            moe_intermediate_size=args.experts.hidden,
            norm_topk_prob=args.experts.normalize,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        twin = Qwen3MoeForCausalLM(config).float()
    twin.load_state_dict(theirs({n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}))
    return twin


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_transformers(case: str) -> None:
    model = build(CASES[case])
    twin = transformers_twin(model)
    tokens, labels, positions = random_batch(model.args)
    logits = model.output(model(tokens, positions))
    their_logits = twin(input_ids=tokens, position_ids=positions).logits
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    loss.backward()
    their_loss.backward()
    found = dict(twin.named_parameters())
    ours = theirs({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {name for name, p in found.items() if p.requires_grad} == {*ours}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, found[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_documents_in_a_row_are_as_alone() -> None:
    model = build(MOE)
    tokens, _, _ = random_batch(MOE, rows=1, seq=20)
    lengths = [7, 1, 12]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(tokens, torch.cat([torch.arange(n) for n in lengths])[None], ids)
    alone = [model(part, torch.arange(part.shape[1])[None]) for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_an_init(case: str) -> None:
    model = Decoder(replace(CASES[case], tied_embeddings=False))
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
