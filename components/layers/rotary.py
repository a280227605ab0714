"""Rotary position embedding: queries and keys are turned by angles proportional to their positions.

Cosines and sines are computed from the positions once per forward, in fp32, and kept in no buffer: nothing has to be
materialized after construction on the meta device, no length has to be foreseen, and positions may restart at
documents. The cost is one small outer product and two small trigonometric kernels a step.

Convention: element j of a head is paired with j + head_dim/2 (Hugging Face's). Meta and DeepSeek pair 2j with 2j + 1;
their heads are brought into the other order first, queries and keys alike, which their product does not notice.
"""

import math

import torch
from torch import Tensor

from components.layers.shapes import Llama3Scaling, Rope, YarnScaling, yarn_mscale


class Rotation:
    """Cosines and sines for all tokens of a batch, fp32. # (rows, seq, 1, head_dim) each

    Both halves hold the same angles, the sines of the first half with a minus: a turn is then x·cos + partner·sin
    over whole heads, three kernels instead of the seven that halves take, which is 1 % of a step of the debug model
    on a CPU.

    Deliberately neither a tuple nor a dataclass: whatever casts the floating tensors among a block's inputs to the
    compute type (FSDP can) then does not find these, which in bf16 would keep two digits.
    """

    def __init__(self, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
        self.cos, self.sin, self.neighbours = cos, sin, neighbours


def inverse_frequencies(width: int, rope: Rope, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of a head of that width, fp32. # (width / 2,)

    Scaled as Llama 3.1 does: pairs that turn more than `high_freq_factor` times over `original_max_position` stay,
    those that turn less than `low_freq_factor` times are divided by `factor`, and in between the two are blended
    linearly in turns; or as YaRN does, linearly in pairs.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_position / (2 * math.pi / frequencies)
        between = scaling.high_freq_factor - scaling.low_freq_factor or 1e-9  # Llama 4 leaves nothing between the two
        kept = (turns - scaling.low_freq_factor) / between
        kept = kept.clamp(0.0, 1.0)
    elif isinstance(scaling, YarnScaling):
        kept = _kept_by_yarn(width, rope.theta, scaling, device)
    else:
        return frequencies / scaling.factor
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_yarn(width: int, theta: float, scaling: YarnScaling, device: torch.device | None) -> Tensor:
    """How much of each pair's frequency stays. # (width / 2,)"""

    def pair_with(turns: float) -> float:
        """The pair, as a fraction, that turns so often over the original length."""
        return width * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    return 1.0 - ((pairs - first) / (last - first or 0.001)).clamp(0.0, 1.0)


def amplitude(rope: Rope) -> float:
    """What cosines and sines are multiplied with."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def rotation(positions: Tensor, width: int, rope: Rope) -> Rotation:
    """The rotation of each token, of heads of that width. `positions` is (rows, seq) int64."""
    frequencies = inverse_frequencies(width, rope, positions.device)
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # (rows, seq, 1, width / 2)
    cos, sin = angles.cos().tile(2), angles.sin()
    sin = torch.cat((-sin, sin), dim=-1)
    if (scale := amplitude(rope)) != 1.0:
        cos, sin = cos * scale, sin * scale
    return Rotation(cos, sin, rope.neighbours)


def apply_rotary(q: Tensor, k: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, computing in fp32 and returning their own type. # (rows, seq, heads, head_dim) each"""
    return rotate(q, turn), rotate(k, turn)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Queries or keys, turned; of neighbours, those with even numbers come first then. # (rows, seq, heads, width)"""
    if turn.neighbours:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # each element's partner
    return torch.addcmul(x * turn.cos, swapped, turn.sin).type_as(x)
