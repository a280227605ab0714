"""A tiny model with everything that the appliers treat specially: embedding, blocks, norm, head, fp32 module, tying."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.mesh.plan import Plan

VOCAB, DIM, SEQ, IGNORE = 29, 12, 7, -100

PLAN = Plan(
    blocks=("layers.*",), embedding="tok_embeddings", head="output", tied=(("tok_embeddings.weight", "output.weight"),)
)


class Gate(nn.Module):
    """Computes in its parameter's own type whatever comes in, as a module that stays fp32 must."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.wqkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)
        self.up = nn.Linear(DIM, 2 * DIM + 1, bias=False)
        self.down = nn.Linear(2 * DIM + 1, DIM, bias=False)
        self.gate = Gate()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        h = (self.norm(x) + angles).to(x.dtype)  # angles are fp32 and must arrive as such
        q, k, v = self.wqkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.gate(self.down(F.silu(self.up(x))))


class Head(nn.Linear):
    def forward(self, input: Tensor, apply: Callable[..., Any] | None = None) -> Any:
        project = super().forward
        return project(input) if apply is None else apply(input, project)


class Tiny(nn.Module):
    def __init__(self, blocks: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(blocks)})
        self.norm = nn.RMSNorm(DIM)
        self.output = Head(DIM, VOCAB, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.linspace(0, 1, SEQ)[:, None].expand(SEQ, DIM)
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x, angles)
        return self.norm(x)


def make(blocks: int = 3, tied: bool = False) -> Tiny:
    """The same parameters each time."""
    torch.manual_seed(0)
    return Tiny(blocks, tied)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each row with another number of valid labels. # (rows, SEQ)"""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (rows, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):
        labels[row, : row % SEQ] = IGNORE
    return tokens[:, :-1], labels


def loss_sum(model: Tiny, tokens: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    """Cross entropy summed over valid labels, with the head called after the model, at once or inside the head."""

    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def chunks(hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        pieces = zip(hidden.split(3, dim=1), labels.split(3, dim=1), strict=True)
        return torch.stack([total(project(h), y) for h, y in pieces]).sum()

    hidden = model(tokens)
    return model.output(hidden, chunks) if chunked else total(model.output(hidden), labels)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, as plain fp32 tensors."""
    from torch.distributed.tensor import DTensor

    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            raise ValueError(f"{name} has no gradient")
        found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return found
