"""The counter generator: its statistics, and that no layout changes a value."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from components.mesh.counter import (
    bits,
    derive_key,
    fill_,
    global_indices,
    keep_mask,
    local_dims,
    normal,
    truncated_normal,
    uniform,
)
from components.runtime.errors import MeshError
from tests.ranks import run_ranks

KEY = derive_key(0, "test")
N = 1_000_000


def test_values_are_pinned() -> None:
    """Seeds mean the same for ever: a change here changes every model that is initialized."""
    assert derive_key(42, "layers.0.attention.wq.weight", 3) == -8336299206259997943
    index = torch.tensor([0, 1, 2**40])
    assert bits(1, index).tolist() == [-2829228101346655311, -2125524831159998110, -98125837572544548]
    assert uniform(1, index).tolist() == [0.8466272354125977, 0.8847750425338745, 0.9946805834770203]
    assert normal(1, index).tolist() == [1.022074818611145, 1.1992008686065674, 2.55434513092041]


def python_bits(key: int, index: int) -> int:
    """The definition, in integers without end."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    first = mix((index * 0x9E3779B97F4A7C15 + key) & mask)
    value = mix(first ^ (key * 0xD1342543DE82EF95) & mask)
    return value - (value >> 63 << 64)


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, -(2**63), KEY])
def test_bits_are_the_definition(key: int) -> None:
    index = [0, 1, 2, 12345, 2**31, 2**52 + 1, 2**63 - 1]
    expected = [python_bits(key, i) for i in index]
    assert bits(key, torch.tensor(index)).tolist() == expected
    assert bits(torch.tensor(key), torch.tensor(index)).tolist() == expected


def test_keys_differ_by_every_part() -> None:
    keys = {derive_key(0), derive_key(1), derive_key(0, "a"), derive_key(0, "a", 1), derive_key(0, "a", "1")}
    keys |= {derive_key(0, "a1"), derive_key(0, "ab", "c"), derive_key(0, "a", "bc")}
    assert len(keys) == 8


def test_every_bit_is_fair_and_independent_of_the_next_index() -> None:
    words = bits(KEY, torch.arange(2**16))
    columns = torch.stack([(words >> b) & 1 for b in range(64)]).double()  # (64, n)
    limit = 5 * 0.5 / math.sqrt(2**16)  # five standard deviations of a mean
    assert (columns.mean(1) - 0.5).abs().max() < limit
    flips = (columns[:, 1:] != columns[:, :-1]).double().mean(1)
    assert (flips - 0.5).abs().max() < limit
    correlation = torch.corrcoef(columns) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / math.sqrt(2**16)


@pytest.mark.parametrize("what", ["index", "key"])
def test_one_changed_input_bit_changes_half_of_the_output(what: str) -> None:
    index = torch.arange(4096)
    for bit in range(0, 62, 3):
        other = bits(KEY, index ^ (1 << bit)) if what == "index" else bits(KEY ^ (1 << bit), index)
        changed = bits(KEY, index) ^ other
        fraction = torch.stack([(changed >> b) & 1 for b in range(64)]).double().mean(1)
        assert (fraction - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(4096)


def test_keys_give_different_functions_not_shifted_ones() -> None:
    gamma = 0x9E3779B97F4A7C15
    shifted = bits((gamma * 5 + 2**63) % 2**64 - 2**63, torch.arange(100))
    assert not set(shifted.tolist()) & set(bits(0, torch.arange(200)).tolist())


def test_uniform_is_flat() -> None:
    values = uniform(KEY, torch.arange(N))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = torch.histc(values, 256, 0.0, 1.0).double()
    chi = ((counts - N / 256) ** 2 / (N / 256)).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_pairs_of_neighbours_fill_the_square() -> None:
    values = uniform(KEY, torch.arange(N)).view(-1, 2)
    cells = (values[:, 0] * 32).long() * 32 + (values[:, 1] * 32).long()
    counts = torch.bincount(cells, minlength=1024).double()
    chi = ((counts - N / 2048) ** 2 / (N / 2048)).sum()
    assert abs(chi - 1023) < 5 * math.sqrt(2 * 1023)


@pytest.mark.parametrize("cutoff", [math.inf, 3.0, 2.0, 0.5])
def test_normal_follows_its_distribution(cutoff: float) -> None:
    values = truncated_normal(KEY, torch.arange(N), cutoff).double()
    assert values.abs().max() <= cutoff
    inside = math.erf(cutoff / math.sqrt(2))
    expected = 0.5 + torch.erf(values.sort().values / math.sqrt(2)) / (2 * inside)
    distance = (expected - (torch.arange(N) + 0.5) / N).abs().max()
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at 0.001


def test_normal_is_exact_over_all_of_its_inputs() -> None:
    from components.mesh.counter import _erfinv

    x = (torch.arange(0, 2**24, 97) * 2 - (2**24 - 1)).float() * 2.0**-24
    torch.testing.assert_close(_erfinv(x).double(), torch.erfinv(x.double()), rtol=5e-7, atol=0)


def filled(shape: tuple[int, ...]) -> Tensor:
    whole = torch.empty(shape)
    fill_(whole, KEY, normal)
    return whole


def test_fill_is_the_function_of_the_flat_index_whatever_chunk_or_dtype() -> None:
    whole = filled((37, 1000, 3))
    assert torch.equal(whole.flatten(), normal(KEY, torch.arange(whole.numel())))
    half = torch.empty(37, 1000, 3, dtype=torch.bfloat16)
    fill_(half, KEY, normal)
    assert torch.equal(half, whole.bfloat16())
    transposed = torch.empty(3, 1000, 37).transpose(0, 2)
    fill_(transposed, KEY, normal)
    assert torch.equal(transposed, whole)
    scalar = torch.empty(())
    fill_(scalar, KEY, normal)
    assert scalar.item() == whole[0, 0, 0].item()


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_chunks_cover_all_indices_in_order(chunk: int) -> None:
    param = torch.empty(5, 4, 3)
    pieces = list(global_indices(param, chunk))
    assert torch.equal(torch.cat([index for _, index in pieces]), torch.arange(60))
    assert [start for start, _ in pieces] == list(range(0, 60, chunk))


def test_fake_and_meta_tensors_are_left_alone() -> None:
    with torch.device("meta"):
        fill_(torch.empty(10**6, 10**6), KEY, normal)
    with FakeTensorMode():
        fill_(torch.empty(10**6, 10**6), KEY, normal)


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "replicate": ((4,), (Replicate(),)),
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "last": ((4,), (Shard(2),)),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "columns and rows": ((2, 2), (Shard(1), Shard(0))),
    "replicas of rows": ((2, 2), (Replicate(), Shard(0))),
}


def _distributed(shapes: list[tuple[int, ...]]) -> dict[str, bool]:
    """For each layout and shape: whether the filled shards are the shards of the filled whole."""
    found = {}
    for name, (mesh_shape, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in shapes:
            whole = filled(shape)
            expected = distribute_tensor(whole, mesh, placements)
            actual = distribute_tensor(torch.zeros(shape), mesh, placements)
            fill_(actual, KEY, normal)
            found[f"{name} {shape}"] = torch.equal(actual.to_local(), expected.to_local())
    return found


def test_shards_hold_the_values_of_the_whole() -> None:
    shapes = [(8, 12, 4), (7, 5, 3), (2, 3, 9), (1, 1, 1)]  # even, uneven, and with ranks that hold nothing
    for found in run_ranks(4, _distributed, shapes):
        assert len(found) == len(LAYOUTS) * len(shapes)
        assert [name for name, equal in found.items() if not equal] == []


class Pair(torch.nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(dim, hidden)
        self.down = torch.nn.Linear(hidden, dim)


def _fsdp_over_tensor_parallel(dim: int, hidden: int, tensor_ranks: int) -> dict[str, bool]:
    """FSDP2 shards what tensor parallelism left: fill the shards, compare with how torch cuts filled wholes."""
    mesh = init_device_mesh("cpu", (4 // tensor_ranks, tensor_ranks), mesh_dim_names=("fsdp", "tp"))
    wholes = {"up.weight": (hidden, dim), "up.bias": (hidden,), "down.weight": (dim, hidden), "down.bias": (dim,)}
    model = Pair(dim, hidden)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(filled(wholes[name]))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        expected = parameter.to_local().clone()
        parameter.data.zero_()
        fill_(parameter, KEY, normal)
        found[name] = torch.equal(parameter.to_local(), expected) and parameter.shape == wholes[name]
    return found


@pytest.mark.parametrize("sizes", [(8, 16), (6, 10), (3, 6)])
def test_fsdp_over_tensor_parallel_shards(sizes: tuple[int, int]) -> None:
    for found in run_ranks(4, _fsdp_over_tensor_parallel, *sizes, 2):
        assert found == dict.fromkeys(("up.weight", "up.bias", "down.weight", "down.bias"), True)


def _partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = DTensor.from_local(torch.zeros(3), mesh, [Partial()])
    try:
        fill_(param, KEY, normal)
    except MeshError as error:
        return str(error)
    return ""


def test_partial_sums_cannot_be_filled() -> None:
    expected = "a parameter with placements (Partial(sum),) cannot be filled: partial sums have no elements"
    assert run_ranks(2, _partial) == [expected] * 2


def test_local_dims_of_a_plain_tensor_are_all() -> None:
    assert [dim.tolist() for dim in local_dims(torch.empty(2, 3))] == [[0, 1], [0, 1, 2]]


def mask(rows: Any, positions: Any, drop: float = 0.25) -> Tensor:
    return keep_mask(derive_key(0, 7, "residual"), torch.as_tensor(rows), torch.as_tensor(positions), 16, drop)


def test_dropout_keeps_its_share() -> None:
    kept = mask(torch.arange(64), torch.arange(128)).double()
    assert kept.shape == (64, 128, 16)
    assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / kept.numel())
    assert mask([0], [0, 1], drop=0.0).all()


def test_slices_of_rows_and_positions_give_slices_of_the_mask() -> None:
    whole = mask(torch.arange(8), torch.arange(32))
    assert torch.equal(mask([1, 3, 5], torch.arange(32)), whole[1:6:2])
    assert torch.equal(mask([6], [31, 0, 7]), whole[6:7, [31, 0, 7]])
    per_row = torch.stack([torch.arange(16), torch.arange(16, 32)])
    assert torch.equal(mask([2, 4], per_row), torch.stack([whole[2, :16], whole[4, 16:]]))


def test_a_key_may_be_a_tensor_and_keys_are_separate() -> None:
    key = derive_key(0, 7, "residual")
    rows, positions = torch.arange(4), torch.arange(8)
    as_tensor = keep_mask(torch.tensor(key), rows, positions, 16, 0.25)
    assert torch.equal(as_tensor, keep_mask(key, rows, positions, 16, 0.25))
    assert not torch.equal(as_tensor, keep_mask(derive_key(0, 8, "residual"), rows, positions, 16, 0.25))
