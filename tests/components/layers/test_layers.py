"""Rotary embedding, attention, feed-forward and head, each against a definition written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.attention import AttentionMask, InnerAttention
from components.layers.feed_forward import FeedForward
from components.layers.head import Head
from components.layers.rotary import apply_rotary, inverse_frequencies, rotation
from components.layers.shapes import FeedForwardShape, Llama3Scaling, Reach, Rope
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
