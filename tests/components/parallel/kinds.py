"""Llama 3 with blocks of other kinds: what attention can be besides plain, two kinds at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from components.layers.attention import Attention
from components.layers.initialize import Init, Normal
from components.layers.shapes import Reach, Temperature
from models.decoder.args import BlockShape
from models.llama3.args import Llama3Args

KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = MappingProxyType(
    {
        "reach": ({"reach": Reach(window=7)}, {"reach": Reach(chunk=10)}),
        "sinks": ({"sinks": True}, {"sinks": True, "reach": Reach(window=7)}),
        "scale": (
            {"scale": 0.9, "bias": True, "out_bias": True, "qk_norm": "after"},
            {"scale": 0.3, "rope": None, "temperature": Temperature(floor=5, scale=0.8)},
        ),
    }
)
"""What sets apart the attention of the first and of the second block."""


@dataclass(frozen=True, kw_only=True)
class KindArgs(Llama3Args):
    """Blocks of one of `KINDS`."""

    kind: str

    def block(self, layer: int) -> BlockShape:
        plain = super().block(layer)
        return replace(plain, attention=replace(plain.attention, **KINDS[self.kind][layer % 2]))


def of_kind(args: Llama3Args, kind: str) -> KindArgs:
    """The same shape with blocks of that kind."""
    return KindArgs(**vars(args), kind=kind)


def drawn(layer: Attention, matrix: Init, into_stream: Init) -> dict[str, Init]:
    """In place of `Attention.inits`: nothing starts at 0, so that whatever is added twice or not at all is seen."""
    return {name: Normal(0.5) for name, _ in layer.named_parameters()}
