"""A Llama and a Qwen3 as TorchTitan has them, written out: its names, its rotation, its checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.nn import functional

from models.decoder.args import DecoderArgs


class Attention(nn.Module):
    def __init__(self, args: DecoderArgs, neighbours: bool) -> None:
        super().__init__()
        self.width, self.neighbours, self.theta = args.head_width, neighbours, args.rope_theta
        self.wq = nn.Linear(args.dim, args.n_heads * self.width, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.width, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.width, bias=False)
        self.wo = nn.Linear(args.n_heads * self.width, args.dim, bias=False)
        self.q_norm = None if neighbours else nn.RMSNorm(self.width, eps=args.norm_eps)
        self.k_norm = None if neighbours else nn.RMSNorm(self.width, eps=args.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.width)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (self.turn(q), self.turn(k), v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(-2))

    def turn(self, x: Tensor) -> Tensor:
        """Each pair of a head as a complex number, times e^(i·angle)."""
        frequencies = self.theta ** -(torch.arange(0, self.width, 2).float() / self.width)
        angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        if self.neighbours:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns).flatten(-2)
        turned = torch.complex(*x.chunk(2, dim=-1)) * turns
        return torch.cat((turned.real, turned.imag), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_hidden, bias=False)
        self.w2 = nn.Linear(args.ffn_hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: DecoderArgs, neighbours: bool) -> None:
        super().__init__()
        self.attention = Attention(args, neighbours)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    """`neighbours`: Llama, whose heads pair neighbours; else Qwen3, whose heads pair halves and are normed."""

    def __init__(self, args: DecoderArgs, neighbours: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(layer): Block(args, neighbours) for layer in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.3)
                if name.endswith(("wq.weight", "wk.weight")):
                    parameter.mul_(3.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, foreach=True)


def tokens_of(args: Any, step: int) -> Tensor:
    return torch.randint(0, args.vocab_size, (2, 12), generator=torch.Generator().manual_seed(step))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, args: Any, steps: range) -> None:
    for step in steps:
        tokens = tokens_of(args, step)
        optimizer.zero_grad()
        loss_of(model(tokens), tokens).backward()
        optimizer.step()


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, alone: bool = True
) -> None:
    """As TorchTitan's checkpointer does: the model's entries at the top, everything else under its part."""
    state: dict[str, Any] = {**get_model_state_dict(model)}
    if optimizer is not None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
        state["lr_scheduler"] = {"last_epoch": step, "_last_lr": [3e-3]}
        state["train_state"] = {"step": step, "ntokens_seen": 24 * step}
        state["dataloader"] = {"dp_rank_0": b"something pickled", "world_size": 1}
    write(folder, state, alone)


def write(folder: Path, state: dict[str, Any], alone: bool = True) -> None:
    """Save it with torch's own tools."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, checkpoint_id=str(folder), no_dist=alone)
