"""Plan: what a model tells the generic appliers about itself. A model says what it is; `components.parallel` does the
rest. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gathered:
    """A module whose inside sees whole sequences: its first input, a piece of each sequence, is gathered at its entry.

    Around such modules hidden states are cut along the sequence (sequence parallelism).
    """


@dataclass(frozen=True)
class Columns:
    """A linear layer whose output features are dealt to ranks. It stands inside of a `Gathered` module."""

    unit: int = 1
    """Features that must stay together: a head's width. Where there are fewer units than ranks, each rank computes the
    unit that it needs, and the weight is replicated. 1: any number of features can be cut, evenly or not."""


@dataclass(frozen=True)
class Rows:
    """A linear layer whose input features are dealt to ranks; its output, their sum, is cut along the sequence."""

    unit: int = 1
    """As in Columns, whose output this layer takes."""


@dataclass(frozen=True)
class Replicated:
    """A module that every rank holds whole and uses on its own tokens or heads; its gradients are summed. Norms."""


@dataclass(frozen=True)
class Dealt:
    """A parameter, named in place of a module, with one element for each head: each rank holds those of its heads. It
    stands right in a `Gathered` module."""


Style = Gathered | Columns | Rows | Replicated | Dealt
"""How tensor parallelism treats one module, or with `Dealt` one parameter."""


@dataclass(frozen=True)
class Plan:
    """A model's structure, by module names relative to the model.

    Names may hold `*` for one path element: `layers.*` means every child of `layers`.
    """

    blocks: tuple[str, ...]
    """The repeated blocks: the unit of recompute, of compile and of sharding."""
    embedding: str
    """The input embedding; sharded on its own, and by vocabulary under tensor parallelism."""
    head: str
    """The output head, sharded on its own: the loss calls it after the model's forward has returned. What is between
    the blocks and the head (the final norm) belongs to the root."""
    fp32: tuple[str, ...] = ()
    """Modules whose parameters stay fp32 under mixed precision."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of parameter names that are one parameter (in some flavors); the root then holds them."""
    tensor: Mapping[str, Style] = field(default_factory=dict)
    """Tensor-parallel style of modules. Every parameter is in or is one of them, in the embedding, the head, or the
    experts. Empty: the model has no plan for tensor parallelism."""
    attention: tuple[str, ...] = ()
    """The modules of attention proper (`InnerAttention`), which context parallelism replaces the inside of. Empty: the
    model has no plan for context parallelism."""
    mask: str = ""
    """The module (`AttentionMask`) that makes the mask that these modules get."""
    experts: tuple[str, ...] = ()
    """The mixture-of-experts layers (`MoE`). Empty: the model has no experts to deal."""
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a module of `order`, others that a pipeline stage that holds it holds besides. Those that are in `order`
    themselves are then in two stages, their parameters kept equal; the rest are there alone."""
    order: tuple[str, ...] = ()
    """All modules that hold parameters, but for what is `beside` another, in the order in which they run: where a
    pipeline can cut. Empty: the model has no plan for pipeline parallelism."""
