"""The counter-based generator: random numbers that are a function of a key and an index, in any layout the same.

Element i of a parameter depends on (key, i) alone, where i counts the elements of the whole parameter. Each rank
evaluates the indices of its own shard and nothing is drawn in an order, so there is nothing that a layout could put
out of order.

**Bits.** Two rounds of SplitMix64's finalizer over `key + i·γ`, with a second word of the key mixed in between. One
round is SplitMix64 itself, which passes BigCrush, but its streams are all pieces of one sequence and two keys may
overlap; the second word makes them different functions. Philox, with its ten rounds of 32-bit products, was rejected:
emulated in int64 tensor operations it costs about four times as much and buys no quality that initialization or
dropout could show.

**Normals.** Inverse of the distribution function, by Giles' polynomials for erf⁻¹. The logarithm in them is our own,
so that every step is an integer operation or a correctly rounded fp32 +, −, ×, ÷ or √: the value is then the same for
any chunk, any vector width and any device. `torch.log` and `torch.erfinv` promise no such thing. A value is exact to
about 1e-6, and the 24 bits behind it end at 5.4 standard deviations.

Price: about a hundred simple kernels per chunk, some 30 ns an element on one CPU core. Chunks bound the extra memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # has no public home; torch's own documentation imports it here
from torch.distributed.tensor import DTensor

from components.runtime.errors import MeshError

Key = int | Tensor
"""A key: an int, or int64 tensor that broadcasts against the index (a key for each row, say)."""
Draw = Callable[[int, Tensor], Tensor]
"""(key, global element indices) → values of the same shape; may be any of the distributions below."""


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
_SECOND = _signed(0xD1342543DE82EF95)  # an odd multiplier of good spectrum, turns the key into its second word
_MASKS = {shift: (1 << (64 - shift)) - 1 for shift in (27, 30, 31, 40)}

# M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2010): coefficients for fp32, highest power first.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 2.1858087e-04, -1.25372503e-03)
_CENTRE += (-4.17768164e-03, 2.46640727e-01, 1.50140941e00)
_TAIL = (-2.00214257e-04, 1.00950558e-04, 1.34934322e-03, -3.67342844e-03, 5.73950773e-03, -7.6224613e-03)
_TAIL += (9.43887047e-03, 1.00167406e00, 2.83297682e00)

_CPU_CHUNK = 2**15  # temporaries stay in the cache of one core
_DEVICE_CHUNK = 2**20  # a few kernels' worth of work; about 30 MB of temporaries


def derive_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key from a seed and whatever names the use; equal on every machine and in every version of Python."""
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def bits(key: Key, index: Tensor) -> Tensor:
    """64 random bits for each index (int64; any shape that `key` broadcasts to), as int64 of the broadcast shape."""
    second = key * _SECOND
    z = index * _GAMMA + key
    return _mix_(_mix_(z).bitwise_xor_(_signed(second) if isinstance(second, int) else second))


def uniform(key: Key, index: Tensor) -> Tensor:
    """Uniform fp32 values in [0, 1), multiples of 2⁻²⁴."""
    return _top24(key, index).to(torch.float32).mul_(2.0**-24)


def normal(key: Key, index: Tensor) -> Tensor:
    """Standard normal fp32 values; the largest magnitude is 5.4."""
    return truncated_normal(key, index, math.inf)


def truncated_normal(key: Key, index: Tensor, cutoff: float) -> Tensor:
    """fp32 values of a standard normal conditioned on magnitudes up to `cutoff` (not clamped: the mass is spread)."""
    odd = _top24(key, index).mul_(2).sub_(2**24 - 1)  # symmetric about 0, never 0, exact in fp32
    x = odd.to(torch.float32).mul_(2.0**-24)
    x = x.mul_(math.erf(cutoff / math.sqrt(2.0))) if math.isfinite(cutoff) else x
    return _erfinv(x).mul_(math.sqrt(2.0))


def keep_mask(key: Key, rows: Tensor, positions: Tensor, width: int, drop: float) -> Tensor:
    """Which elements dropout keeps: the only randomness that a forward pass may have.

    Derive `key` from (seed, step, name of the place). An element depends on it, on the row's number in the global
    batch, on the position and on its channel alone: any split of rows or positions over ranks or microbatches gives
    the same mask.

    Args:
        key: From `derive_key`; a 0-dim int64 tensor spares a recompilation at each step.
        rows: Numbers of the rows in the global batch, int64. # (rows,)
        positions: Position of each token in its row, int64. # (rows, seq) or (seq,)
        width: Channels of an element.
        drop: Probability of dropping, in [0, 1).

    Returns:
        Bool mask. # (rows, seq, width)
    """
    token_keys = bits(bits(key, rows)[:, None], positions)  # (rows, seq)
    return uniform(token_keys[..., None], torch.arange(width, device=rows.device)) >= drop


@torch.no_grad()
def fill_(param: Tensor, key: int, draw: Draw) -> None:
    """Write `draw(key, global index)` into the local shard of a plain tensor or DTensor, of any dtype, in place.

    Meta and fake tensors have no elements: they are left as they are. Raises MeshError for partial placements.
    """
    local = param.to_local() if isinstance(param, DTensor) else param
    if local.is_meta or isinstance(local, FakeTensor) or local.numel() == 0:
        return
    flat = local.view(-1) if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
    target = flat.view(-1)
    for start, index in global_indices(param):
        target[start : start + len(index)] = draw(key, index)
    if flat.data_ptr() != local.data_ptr():
        local.copy_(flat)


def global_indices(param: Tensor, chunk: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Where the local shard's elements lie in the whole parameter, chunk by chunk.

    Args:
        param: Plain tensor (all of it is local), or DTensor: replicated, sharded, or as FSDP2 does it; even or not.
        chunk: Elements of a chunk; None: what suits the device.

    Yields:
        Offset of the chunk in the flattened local shard, and the flat indices of its elements in the flattened whole
        parameter (int64, on the parameter's device).
    """
    dims = local_dims(param) if isinstance(param, DTensor) else []  # a plain tensor is one range: no table of it
    sizes = [len(dim) for dim in dims] if dims else list(param.shape)
    total = math.prod(sizes)
    chunk = chunk or (_CPU_CHUNK if param.device.type == "cpu" else _DEVICE_CHUNK)
    first = _first_of_contiguous(dims, param.shape)
    for start in range(0, total, chunk):
        at = torch.arange(start, min(start + chunk, total), device=param.device)
        yield start, at.add_(first) if first is not None else _gather(at, dims, sizes, param.shape)


def local_dims(param: Tensor) -> list[Tensor]:
    """For each dimension, the global positions along it that the local shard holds. # (local size,) each"""
    dims = [torch.arange(size, device=param.device) for size in param.shape]
    if not isinstance(param, DTensor):
        return dims
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return [dim[:0] for dim in dims]
    for mesh_dim in _order(param):
        dim = param.placements[mesh_dim].dim  # pyrefly: ignore[missing-attribute]  # _order gives sharded ones only
        parts = dims[dim].chunk(param.device_mesh.size(mesh_dim))
        rank = coordinate[mesh_dim]
        dims[dim] = parts[rank] if rank < len(parts) else dims[dim][:0]
    return dims


def _order(param: DTensor) -> list[int]:
    """The mesh dimensions that shard `param`, in the order in which they cut it.

    Left to right, but for FSDP2 over tensor parallelism, which cuts what tensor parallelism left: its placement
    carries a `split_factor`, the number of pieces that later mesh dimensions had made already. The attribute is read
    rather than the private class imported.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(param.device_mesh.ndim)):
        placement = param.placements[mesh_dim]
        if placement.is_partial():
            raise MeshError(
                f"a parameter with placements {param.placements} cannot be filled: partial sums have no elements"
            )
        dim = getattr(placement, "dim", None)
        if dim is None:
            continue
        pieces, place = getattr(placement, "split_factor", 1), 0
        while pieces > 1 and place < len(order):
            earlier = param.placements[order[place]]
            pieces //= param.device_mesh.size(order[place]) if getattr(earlier, "dim", None) == dim else 1
            place += 1
        order.insert(place, mesh_dim)
    return order


def _first_of_contiguous(dims: list[Tensor], shape: torch.Size) -> int | None:
    """The first global index if the shard is one unbroken range of the flattened parameter (whole rows), else None."""
    if not dims:
        return 0
    rows = dims[0]
    if any(len(dim) < size for dim, size in zip(dims[1:], shape[1:], strict=True)) or len(rows) == 0:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return first * math.prod(shape[1:]) if last - first == len(rows) - 1 else None


def _gather(at: Tensor, dims: list[Tensor], sizes: list[int], shape: torch.Size) -> Tensor:
    """Flat local offsets to flat global indices. # (chunk,)"""
    index = torch.zeros_like(at)
    for d in reversed(range(len(dims))):
        index += dims[d][at % sizes[d]] * math.prod(shape[d + 1 :])
        at = at // sizes[d]
    return index


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place. The mask makes `>>`, which copies the sign in int64, a logical shift."""
    z ^= (z >> 30).bitwise_and_(_MASKS[30])
    z *= _MIX1
    z ^= (z >> 27).bitwise_and_(_MASKS[27])
    z *= _MIX2
    z ^= (z >> 31).bitwise_and_(_MASKS[31])
    return z


def _top24(key: Key, index: Tensor) -> Tensor:
    """Integers in [0, 2²⁴), as int32: half the memory traffic of what follows."""
    return (bits(key, index) >> 40).bitwise_and_(_MASKS[40]).to(torch.int32)


def _erfinv(x: Tensor) -> Tensor:
    """Inverse error function of fp32 values in (−1, 1). Two polynomials in w = −log(1 − x²), of which one is taken."""
    w = _negative_log((1.0 - x) * (1.0 + x))
    centre = _polynomial(w - 2.5, _CENTRE)
    tail = _polynomial(w.sqrt().sub_(3.0), _TAIL)
    return torch.where(w < 5.0, centre, tail).mul_(x)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = x * coefficients[0]
    for c in coefficients[1:-1]:
        result.add_(c).mul_(x)
    return result.add_(coefficients[-1])


def _negative_log(t: Tensor) -> Tensor:
    """−log of positive normal fp32 values, to about 1e-7: exponent, and the series of atanh for the mantissa."""
    raw = t.view(torch.int32)
    exponent = (raw - 0x3F3504F3) >> 23  # so that the mantissa lies in [√½, √2)
    f = (raw - (exponent << 23)).view(torch.float32).sub_(1.0)
    s = f / (f + 2.0)
    series = _polynomial(s * s, (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)).mul_(s)
    return exponent.to(torch.float32).mul_(-math.log(2.0)).sub_(series)
