"""Tiles of attention: the kernels against plain operations, those against autograd, and tiles put together."""

import pytest
import torch
import torch.nn.functional as F

from components.mesh.attention_kernels import plain_backward, plain_forward, tile_backward, tile_forward
from components.mesh.tiled_attention import BLOCK, Tile, Tiling, single, tiled_attention
from components.runtime.errors import MeshError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("case", ["all", "causal", "mask", "one mask for all rows"])
def test_kernels_compute_what_plain_operations_do(case: str, scale: float | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 6, 5, 8, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 2, 5, 8, generator=generator).to(dtype) for _ in range(2))
    shape = (2 if case == "mask" else 1, 1, 5, 5)
    mask = torch.rand(*shape, generator=generator) < 0.4 if "mask" in case else None
    if mask is not None:
        mask[0, 0, 2] = False  # a query without a key
    whole_k, whole_v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    out, lse = tile_forward(q, k, v, mask, case == "causal", scale)
    want_out, want_lse = plain_forward(q, whole_k, whole_v, mask, case == "causal", scale)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, want_out, rtol=bound, atol=bound)
    torch.testing.assert_close(lse, want_lse, rtol=bound, atol=bound)
    lse = lse.clamp(min=0.0) + 1.0  # other tiles add to it
    found = tile_backward(grad, q, out.to(dtype), lse, k, v, mask, case == "causal", scale)
    dq, dk, dv = plain_backward(grad, q, out.to(dtype), lse, whole_k, whole_v, mask, case == "causal", scale)
    wanted = (dq, dk.unflatten(1, (2, 3)).sum(2), dv.unflatten(1, (2, 3)).sum(2))
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=2 * bound, atol=2 * bound)


def test_plain_operations_are_differentiated_rightly() -> None:
    q, k, v, grad = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    out, lse = plain_forward(q, k, v, None, True, 0.3)
    torch.testing.assert_close(out, want)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    for gradient, expected in zip(plain_backward(grad, q, out, lse, k, v, None, True, 0.3), wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0], dtype=torch.float64)], ids=["plain", "sinks"])
def test_tiles_put_together_are_the_whole_with_every_gradient(sinks: torch.Tensor | None) -> None:
    """Values wider than keys, and two tiles for the second half of the queries."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 2, 4, 5, generator=generator, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, *(() if sinks is None else (sinks,)))]
    tiles = (Tile(0, 2, 0, 2, 0, True), Tile(2, 2, 2, 2, 2, True), Tile(2, 2, 0, 2, 0, False))
    out = tiled_attention(q, k, v, None, Tiling((tiles,)), 0.3, sinks)
    scores = (q @ k.mT * 0.3).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(1, 2, 4, 1)), dim=-1)
    want = scores.softmax(-1)[..., :4] @ v
    torch.testing.assert_close(out, want)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(want, inputs, grad)
    for gradient, expected in zip(torch.autograd.grad(out, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_some_queries_at_a_time_with_a_mask() -> None:
    """Rows longer than a tile, tokens in any order, more keys than queries; and all at once where it is causal."""
    assert single(5 * BLOCK, 5 * BLOCK, causal=True).steps == ((Tile(0, 5 * BLOCK, 0, 5 * BLOCK, 0, True),),)
    generator, queries, keys = torch.Generator().manual_seed(0), 2 * BLOCK + 9, 2 * BLOCK + 30
    q, k, v, grad = (torch.randn(1, 2, n, 4, generator=generator) for n in (queries, keys, keys, queries))
    mask = torch.rand(1, 1, queries, keys, generator=generator) < 0.3
    inputs, sinks = [x.requires_grad_() for x in (q, k, v)], torch.tensor([0.5, -2.0])
    whole = Tiling(((Tile(0, queries, 0, keys, 0, False),),))
    tiling = single(queries, keys, causal=False)
    assert [tile.queries for tile in tiling.steps[0]] == [BLOCK, BLOCK, 9]
    want, found = (tiled_attention(q, k, v, mask, each, None, sinks) for each in (whole, tiling))
    torch.testing.assert_close(found, want)
    for gradient, expected in zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, want)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_keys_travel_between_ranks_only() -> None:
    x, tiles = torch.randn(1, 1, 2, 4), (Tile(0, 2, 0, 2, 0, True),)
    with pytest.raises(MeshError) as error:
        tiled_attention(x, x, x, None, Tiling((tiles, tiles)))
    assert str(error.value) == "attention in several steps needs ranks that keys travel between"
