"""Root-mean-square norms (Zhang and Sennrich, 2019), computed in fp32 whatever comes in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers.initialize import Constant, Init
from components.layers.shapes import NormShape


class ZeroCenteredRMSNorm(nn.Module):
    """A norm whose weight is what is added to 1, so that weight decay draws it to 1; Gemma's. The product with the
    weight is rounded once, where nn.RMSNorm's callers round it as torch does."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """# (..., dim) → (..., dim)"""
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def norm(dim: int, shape: NormShape) -> nn.Module:
    """A norm over the last dimension, with a weight."""
    return ZeroCenteredRMSNorm(dim, shape.eps) if shape.zero_centered else nn.RMSNorm(dim, eps=shape.eps)


def unweighted_norm(x: Tensor, eps: float) -> Tensor:
    """The norm over the last dimension without a weight, returned in the type of `x`. # (..., dim) → (..., dim)"""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).type_as(x)


def norm_inits(module: nn.Module) -> dict[str, Init]:
    """Weights of all norms in a module, by name, so that they change nothing."""
    plain = {f"{n}.weight": Constant(1.0) for n, part in module.named_modules() if isinstance(part, nn.RMSNorm)}
    centered = (name for name, part in module.named_modules() if isinstance(part, ZeroCenteredRMSNorm))
    return {**plain, **{f"{name}.weight": Constant(0.0) for name in centered}}
