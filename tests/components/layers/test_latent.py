"""Latent attention against its definition written out, head by head and pair by pair."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.initialize import Constant, Normal
from components.layers.latent import LatentAttention
from components.layers.rotary import rotation
from components.layers.shapes import LatentShape, Rope, YarnScaling
from components.mesh.plan import Columns, Gathered, Replicated, Rows

ROPE = Rope(100.0, neighbours=True)
SHAPE = LatentShape(n_heads=3, q_rank=7, kv_rank=6, nope_dim=5, rope_dim=4, v_dim=8, rope=ROPE)
ONE_MATRIX = replace(SHAPE, q_rank=0)
DIM = 12


def layer(shape: LatentShape) -> LatentAttention:
    torch.manual_seed(0)
    made = LatentAttention(DIM, shape)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Element 2j with 2j + 1, as a complex number."""
    parts = []
    for pair in range(len(x) // 2):
        z = torch.complex(x[2 * pair], x[2 * pair + 1])
        z = z * cmath.exp(1j * position * 100.0 ** (-2 * pair / len(x)))
        parts += [z.real, z.imag]
    return torch.stack(parts)


def written_out(made: LatentAttention, x: Tensor) -> Tensor:
    """One row. # (seq, dim) → (seq, dim)"""
    s = made.shape
    w = {name: parameter.detach() for name, parameter in made.named_parameters()}
    q = (
        x @ w["wq.weight"].T
        if not s.q_rank
        else normed(x @ w["wq_a.weight"].T, w["q_norm.weight"]) @ w["wq_b.weight"].T
    )
    narrow = x @ w["wkv_a.weight"].T
    kv = normed(narrow[:, : s.kv_rank], w["kv_norm.weight"]) @ w["wkv_b.weight"].T
    shared = torch.stack([turned(key, at) for at, key in enumerate(narrow[:, s.kv_rank :])])
    outs = []
    for head in range(s.n_heads):
        own_q = q.unflatten(-1, (s.n_heads, -1))[:, head]
        own_kv = kv.unflatten(-1, (s.n_heads, -1))[:, head]
        turned_q = torch.stack([turned(query, at) for at, query in enumerate(own_q[:, s.nope_dim :])])
        scores = own_q[:, : s.nope_dim] @ own_kv[:, : s.nope_dim].T + turned_q @ shared.T
        scores = scores * s.scale
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        outs.append(scores.softmax(-1) @ own_kv[:, s.nope_dim :])
    return torch.cat(outs, -1) @ w["wo.weight"].T


@pytest.mark.parametrize("shape", [SHAPE, ONE_MATRIX], ids=["two matrices for queries", "one"])
def test_it_is_its_definition(shape: LatentShape) -> None:
    made = layer(shape)
    x = torch.randn(2, 6, DIM)
    positions = torch.arange(6).expand(2, 6)
    found = made(x, rotation(positions, shape.rotary_width, ROPE), None, positions)
    torch.testing.assert_close(found, torch.stack([written_out(made, row) for row in x]), rtol=1e-4, atol=1e-5)


def test_yarn_sharpens_scores() -> None:
    assert SHAPE.scale == 1 / 3
    plain = replace(SHAPE, rope=replace(ROPE, scaling=YarnScaling(40.0, 4096)))
    assert plain.scale == 1 / 3
    sharper = replace(SHAPE, rope=replace(ROPE, scaling=YarnScaling(40.0, 4096, mscale=0.5, mscale_all_dim=0.7)))
    assert sharper.scale == pytest.approx((0.07 * math.log(40) + 1) ** 2 / 3)
    made = layer(sharper)
    q, k, v = (torch.randn(1, 3, 5, width) for width in (9, 9, 8))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sharper.scale)
    assert torch.equal(made.inner(q, k, v), expected)


@pytest.mark.parametrize("shape", [SHAPE, ONE_MATRIX])
def test_counts_styles_and_inits_are_those_of_the_layer(shape: LatentShape) -> None:
    made = layer(shape)
    assert sum(p.numel() for p in made.parameters()) == shape.parameters(DIM)
    assert sum(p.numel() for p in made.parameters() if p.ndim == 2) == shape.matrices(DIM)
    names = {name for name, _ in made.named_parameters()}
    assert {f"{name}.weight" for name in shape.styles() if name} == names
    inits = made.inits(Normal(1.0), Normal(2.0))
    assert inits.keys() == names
    assert inits["wo.weight"] == Normal(2.0)
    assert inits["wkv_a.weight"] == Normal(1.0)
    assert inits["kv_norm.weight"] == Constant(1.0)


def test_styles_keep_heads_together() -> None:
    styles = SHAPE.styles()
    assert styles[""] == Gathered()
    assert styles["wq_b"] == Columns(unit=9)
    assert styles["wkv_b"] == Columns(unit=13)
    assert styles["wo"] == Rows(unit=8)
    assert styles["wkv_a"] == Replicated()
