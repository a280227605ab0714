"""Rotary embedding, attention, feed-forward and head, each against a definition written out."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.attention import Attention, AttentionMask, InnerAttention
from components.layers.feed_forward import FeedForward
from components.layers.head import Head
from components.layers.initialize import Normal
from components.layers.rotary import apply_rotary, inverse_frequencies, rotation
from components.layers.shapes import (
    AttentionShape,
    FeedForwardShape,
    Llama3Scaling,
    NormShape,
    Reach,
    Rope,
    Temperature,
)
from components.mesh.batch import RowLoss

LLAMA31, LLAMA32 = Llama3Scaling(factor=8.0), Llama3Scaling(factor=32.0)


@pytest.mark.parametrize(("scaling", "head_dim"), [(LLAMA31, 128), (LLAMA32, 64), (None, 128)])
def test_frequencies_are_transformers_bit_for_bit(scaling: Llama3Scaling | None, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 5e5}
    if scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": 8192}
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(inverse_frequencies(head_dim, Rope(5e5, scaling)), expected)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 100]])
    turned, _ = apply_rotary(x, x, rotation(positions, 8, Rope(100.0)))
    for row in range(2):
        for at in range(5):
            for pair in range(4):
                angle = positions[row, at].item() * 100.0 ** (-2 * pair / 8)
                plane = torch.complex(x[row, at, :, pair], x[row, at, :, pair + 4])
                expected = plane * complex(math.cos(angle), math.sin(angle))
                actual = torch.complex(turned[row, at, :, pair], turned[row, at, :, pair + 4])
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rotation_computes_in_fp32_and_keeps_the_type() -> None:
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turn = rotation(torch.tensor([[5000, 5001, 5002, 5003]]), 8, Rope(1e4))
    q, k = apply_rotary(x, x, turn)
    expected, _ = apply_rotary(x.float(), x.float(), turn)
    assert torch.equal(q, expected.bfloat16())
    assert torch.equal(k, q)


def causal_mask(ids: Tensor) -> Tensor:
    """Which key each query may see: not a later one, and none of another document. # (rows, 1, seq, seq)"""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return ((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]


DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 1, 0, 1, 2, 3, 4]])


def sees(reach: Reach, ids: list[int], query: int, key: int) -> bool:
    """The definition: by positions within the document."""
    first = ids.index(ids[query])
    window, chunk = reach.window or len(ids), reach.chunk or len(ids)
    near = query - key < window and (query - first) // chunk == (key - first) // chunk
    return ids[query] == ids[key] and key <= query and near


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "reach", [Reach(), Reach(window=1), Reach(window=3), Reach(window=8), Reach(chunk=3), Reach(3, 2), Reach(99, 99)]
)
def test_masks_are_their_definition(reach: Reach, packed: bool) -> None:
    mask = AttentionMask(reach)(POSITIONS, DOCUMENTS if packed else None)
    if mask is None:  # plain causal attention
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    documents = DOCUMENTS.tolist() if packed else [[0] * 8]
    want = [[[sees(reach, ids, query, key) for key in range(8)] for query in range(8)] for ids in documents]
    assert torch.equal(mask, torch.tensor(want)[:, None])


def test_a_mask_is_made_only_where_causal_attention_does_not_suffice() -> None:
    made = {reach: AttentionMask(reach)(POSITIONS, None) is not None for reach in (Reach(), Reach(8, 8), Reach(7))}
    assert made == {Reach(): False, Reach(8, 8): False, Reach(7): True}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(kv_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, 6, 8, generator=generator) for _ in range(2))
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    mask = causal_mask(ids if masked else torch.zeros_like(ids))
    wide_k, wide_v = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    scores = (q @ wide_k.transpose(2, 3) / math.sqrt(8)).masked_fill(~mask, -math.inf)
    actual = InnerAttention()(q, k, v, mask if masked else None)
    torch.testing.assert_close(actual, scores.softmax(-1) @ wide_v)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """The definition: with sinks, one more column of scores, whose weight goes to nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


@pytest.mark.parametrize("reach", [None, Reach(), Reach(window=2)], ids=["causal", "documents", "window"])
@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sinks_are_their_definition_with_every_gradient(
    kv_heads: int, scale: float | None, reach: Reach | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 8, 6), (2, kv_heads, 8, 6), (2, kv_heads, 8, 6), (4,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = None if reach is None else AttentionMask(reach)(POSITIONS, DOCUMENTS)
    allowed = torch.ones(8, 8, dtype=torch.bool).tril() if mask is None else mask
    q, k, v, sinks = inputs
    want = softmax_attention(q, k, v, allowed, 6**-0.5 if scale is None else scale, sinks)
    actual = InnerAttention(scale)(q, k, v, mask, sinks)
    torch.testing.assert_close(actual, want)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_sinks_gradients_are_added_up_in_fp32() -> None:
    """A thousand queries' equal shares in bf16: added up in bf16, they would stop at a few hundred of them."""
    ones = torch.ones(1, 1, 1024, 8)
    q, v = torch.zeros_like(ones).bfloat16(), ones.bfloat16()
    sinks = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    InnerAttention()(q, q, v, None, sinks).sum().backward()
    keys = torch.arange(1, 1025, dtype=torch.float64)
    want = -(8 * keys / (keys + 1) ** 2).sum()
    torch.testing.assert_close(sinks.grad, torch.tensor([want]).bfloat16(), rtol=1e-2, atol=0.0)


PLAIN = AttentionShape(4, 2, 6, Rope(100.0))


@pytest.mark.parametrize(
    "shape",
    [
        PLAIN,
        replace(PLAIN, bias=True),
        replace(PLAIN, out_bias=True),
        replace(PLAIN, scale=0.9),
        replace(PLAIN, sinks=True),
        replace(PLAIN, qk_norm="before"),
        replace(PLAIN, qk_norm="after", temperature=Temperature(2, 0.5)),
        replace(PLAIN, rope=None),
        replace(PLAIN, rope=None, qk_norm="after", temperature=Temperature(2, 0.5)),
    ],
)
def test_attention_layers_are_their_definition_with_every_gradient(shape: AttentionShape) -> None:
    """Llama 4's norm without weights goes with rotary positions only, its temperature with none only."""
    torch.manual_seed(0)
    layer = Attention(10, shape, NormShape(1e-3))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [torch.randn(2, 8, 10, requires_grad=True), *layer.parameters()]
    mask = AttentionMask(Reach())(POSITIONS, DOCUMENTS)
    turn = None if shape.rope is None else rotation(POSITIONS, 6, shape.rope)
    got, want = layer(inputs[0], turn, mask, POSITIONS), written_out(layer, inputs[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grad = torch.randn(want.shape)
    wanted = torch.autograd.grad(want, inputs, grad)
    for gradient, expected in zip(torch.autograd.grad(got, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in layer.parameters()) == shape.parameters(10)
    assert layer.inits(Normal(1.0), Normal(1.0)).keys() == dict(layer.named_parameters()).keys()


def written_out(layer: Attention, x: Tensor) -> Tensor:
    """Attention in packed rows of `DOCUMENTS`. # (2, 8, dim) → (2, 8, dim)"""
    shape = layer.shape

    def normed(heads: Tensor) -> Tensor:
        return heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    q, k, v = (linear(x).unflatten(-1, (-1, 6)) for linear in (layer.wq, layer.wk, layer.wv))
    if shape.qk_norm == "before":
        q = normed(q) * layer.get_parameter("q_norm.weight")
        k = normed(k) * layer.get_parameter("k_norm.weight")
    if shape.rope is not None:
        q, k = apply_rotary(q, k, rotation(POSITIONS, 6, shape.rope))
        if shape.qk_norm == "after":
            q, k = normed(q), normed(k)
    elif (tuning := shape.temperature) is not None:
        factors = [
            [1 + tuning.scale * math.log(1 + (at + 1) // tuning.floor) for at in row] for row in POSITIONS.tolist()
        ]
        q = q * torch.tensor(factors)[:, :, None, None]
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = softmax_attention(q, k, v, causal_mask(DOCUMENTS), shape.scale or 6**-0.5, layer.sinks)
    return layer.wo(out.transpose(1, 2).flatten(2))


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(8, FeedForwardShape(12))
    x = torch.randn(2, 3, 8)
    gate, up = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.w2.weight.T)


def test_head_projects_or_lets_a_loss_run_inside() -> None:
    head, hidden = Head(8, 16), torch.randn(2, 3, 8)
    fired: list[int] = []
    head.register_forward_hook(lambda *_: fired.append(1))
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.weight))

    def loss(states: Tensor, project: object) -> RowLoss:
        assert callable(project)
        sums = torch.stack([project(states[:, i]).sum(-1) for i in range(3)]).sum(0)
        return RowLoss(sums, torch.full((2,), 3))

    result = head(hidden, loss)
    torch.testing.assert_close(result.sums, head(hidden).sum((1, 2)))
    assert isinstance(result, RowLoss)
    assert len(fired) == 3
