"""Quantized weights, dequantized as they are read: of the files no more than the elements that are asked for, the
scales of the blocks that they lie in, and the rest of a group of 32 where values are packed.

Values are computed in fp32, where FP8 times a factor is rounded once, and MXFP4 is exact. Dequantizing whole tensors
first was rejected: each rank would do all of the work, in twice to eight times the memory. Formats: see `hf_sources`.
"""

import torch
from torch import Tensor

from components.checkpoint.hf_read import OpenFiles, read_part
from components.checkpoint.hf_sources import GROUP, Quantized, Source
from components.checkpoint.links import Span
from components.checkpoint.safetensors import Place
from components.runtime.errors import CheckpointError

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS, _NAN = 127, 255


def read_source(files: OpenFiles, source: Source, part: tuple[Span, ...]) -> Tensor:
    """Elements of a tensor of theirs: of dimension d the indices `part[d]`. Raises CheckpointError, OSError."""
    if isinstance(source, Place):
        return _read(files, source, part)
    return _read_packed(files, source, part) if source.block is None else _read_blocks(files, source, part)


def _read(files: OpenFiles, place: Place, part: tuple[Span, ...]) -> Tensor:
    return read_part(files.file(place.file), place, part)


def _read_blocks(files: OpenFiles, source: Quantized, part: tuple[Span, ...]) -> Tensor:
    """FP8: each element times its block's factor."""
    values = _read(files, source.values, part).float()
    (rows, of_row), (columns, of_column) = (_groups(span, n) for span, n in zip(part, source.block or (), strict=True))
    return values.mul_(_read(files, source.scales, (rows, columns))[of_row][:, of_column])


def _read_packed(files: OpenFiles, source: Quantized, part: tuple[Span, ...]) -> Tensor:
    """MXFP4: `part` is of (experts, in, out), while the files have (experts, out, groups of in)."""
    experts, inner, rows = part
    groups, _ = _groups(inner, GROUP)
    packed = _read(files, source.values, (experts, rows, groups, Span(0, GROUP // 2)))  # low four bits first
    scales = _read(files, source.scales, (experts, rows, groups))
    if (scales == _NAN).any():
        raise CheckpointError(f"{source.scales.file} holds scales of MXFP4 that are not a number ({_NAN})")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # (experts, rows, groups, 32)
    values = torch.tensor(_E2M1)[codes.int()]
    values = torch.ldexp(values, scales.int().sub_(_BIAS)[..., None]).flatten(-2)
    start = inner.start - groups.start * GROUP
    return values[:, :, Span(start, inner.count, inner.step).slice].transpose(1, 2)


def _groups(span: Span, size: int) -> tuple[Span, Tensor]:
    """The groups of `size` indices that the span lies in, and for each of its indices which of these it is."""
    group = (span.start + span.step * torch.arange(span.count)) // size
    first, last = int(group[0]), int(group[-1])
    return Span(first, last - first + 1), group - first
