"""Rotary position embedding: queries and keys are turned by angles proportional to their positions.

Cosines and sines are computed from the positions once per forward, in fp32, and kept in no buffer: nothing has to be
materialized after construction on the meta device, no length has to be foreseen, and positions may restart at
documents. The cost is one small outer product and two small trigonometric kernels a step.

Convention: element j of a head is paired with j + head_dim/2 (Hugging Face's). Meta pairs 2j with 2j + 1; its published
weights are the same up to a permutation, Hugging Face's need none here.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """Llama 3.1's stretching of the frequencies; see `inverse_frequencies`."""

    @property
    def factor(self) -> float:
        """Slow frequencies are divided by this."""
        ...

    @property
    def low_freq_factor(self) -> float:
        """Turns over the original length below which a frequency is slow."""
        ...

    @property
    def high_freq_factor(self) -> float:
        """Turns over the original length above which a frequency stays."""
        ...

    @property
    def original_max_position(self) -> int:
        """The original length, in tokens."""
        ...


class Rotation:
    """Cosines and sines for all tokens of a batch, fp32. # (rows, seq, 1, head_dim) each

    Both halves hold the same angles, the sines of the first half with a minus: a turn is then x·cos + partner·sin
    over whole heads, three kernels instead of the seven that halves take, which is 1 % of a step of the debug model
    on a CPU.

    Deliberately neither a tuple nor a dataclass: whatever casts the floating tensors among a block's inputs to the
    compute type (FSDP can) then does not find these, which in bf16 would keep two digits.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians per position of each pair, fp32. # (head_dim / 2,)

    With `scaling`, as Llama 3.1: pairs that turn more than `high_freq_factor` times over `original_max_position`
    stay, those that turn less than `low_freq_factor` times are divided by `factor`, and in between the two are
    blended linearly.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """The rotation of each token. `positions` is (rows, seq) int64, `frequencies` comes from `inverse_frequencies`."""
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # (rows, seq, 1, head_dim / 2)
    sin = angles.sin()
    return Rotation(angles.cos().tile(2), torch.cat((-sin, sin), dim=-1))


def apply_rotary(q: Tensor, k: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, computing in fp32 and returning their own type. # (rows, seq, heads, head_dim) each"""
    return _rotate(q, turn), _rotate(k, turn)


def _rotate(x: Tensor, turn: Rotation) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # each element's partner
    return torch.addcmul(x * turn.cos, swapped, turn.sin).type_as(x)
