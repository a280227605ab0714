"""What layers are shaped like, without torch: numbers that a flavor names, what they cost, and how ranks share them.

A layer takes its shape as it is, and a model's arguments are made of shapes: so counting parameters, refusing a layout
and building the layer read the same fields. Formulas that stand with each family were rejected: every family would
repeat them, and one of them would be wrong. How tensor parallelism treats a layer's modules stands here too, since it
follows from the same fields.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from components.mesh.plan import Columns, Dealt, Gathered, Replicated, Rows, Style
from components.runtime.errors import ConfigError


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 and 3.2 stretch rotary embeddings beyond the length that they were first trained at."""

    factor: float
    """Slow frequencies are divided by this."""
    low_freq_factor: float = 1.0
    """Frequencies with fewer turns than this over `original_max_position` are slow."""
    high_freq_factor: float = 4.0
    """Frequencies with more turns than this stay as they are; between the two the division fades in."""
    original_max_position: int = 8192
    """Length in tokens of the first training."""


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by one number (Chen et al., "Extending Context Window …", 2023)."""

    factor: float
    """What they are divided by."""


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): slow frequencies are divided, fast ones stay, and cosines and sines are scaled."""

    factor: float
    """Slow frequencies are divided by this."""
    original_max_position: int
    """Length in tokens of the first training."""
    beta_fast: float = 32.0
    """Frequencies with more turns than this over `original_max_position` stay as they are."""
    beta_slow: float = 1.0
    """Frequencies with fewer turns than this are divided; between the two the division fades in, by pair."""
    truncate: bool = True
    """The first and the last pair in between are rounded outwards to whole pairs."""
    mscale: float | None = None
    """DeepSeek's: cosines and sines are scaled by m(mscale) / m(mscale_all_dim), where m(x) = 0.1·x·ln(factor) + 1.
    None: by m(1)."""
    mscale_all_dim: float | None = None
    """See `mscale`. DeepSeek's attention multiplies its scores by m(mscale_all_dim)² besides."""


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's m: how much sharper attention is made for a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


Scaling = Llama3Scaling | LinearScaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer."""

    theta: float
    """Base of the frequencies."""
    scaling: Scaling | None = None
    """How they are stretched; None: not at all."""
    neighbours: bool = False
    """Element 2j of a head is paired with 2j + 1, as Meta and DeepSeek do; else j with j + width / 2."""


@dataclass(frozen=True)
class Reach:
    """Which earlier tokens of its document a query sees; by default all."""

    window: int | None = None
    """The last so many, itself included."""
    chunk: int | None = None
    """Those of its own chunk, of so many tokens, counted from the document's start."""

    def mean_keys(self, seq_len: int) -> float:
        """Keys that a query of a row of `seq_len` tokens meets on average, half a key more or less."""
        if self.chunk is not None and self.chunk < seq_len:
            return self.chunk / 2
        if self.window is not None and self.window < seq_len:
            return self.window - self.window**2 / (2 * seq_len)
        return seq_len / 2


@dataclass(frozen=True)
class Temperature:
    """Llama 4's tuning in layers without positions: queries are scaled by 1 + scale · ln(1 + ⌊(position + 1) /
    floor⌋)."""

    floor: int = 8192
    """Tokens after which it begins."""
    scale: float = 0.1
    """How strong it is."""


@dataclass(frozen=True)
class NormShape:
    """Root-mean-square norms."""

    eps: float = 1e-6
    """Added to the mean square."""
    zero_centered: bool = False
    """The weight is what is added to 1, as in Gemma."""


QKNorm = Literal["before", "after", "none"]
"""Whether each head's queries and keys are normed, with weights before they are turned, or without after."""


@dataclass(frozen=True)
class AttentionShape:
    """Grouped-query self-attention."""

    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads; divides `n_heads`."""
    head_dim: int
    """Width of one head."""
    rope: Rope | None
    """Rotary positions; None: this layer has no positions."""
    reach: Reach = Reach()
    """Which tokens a query sees."""
    qk_norm: QKNorm = "none"
    """How queries and keys are normed."""
    scale: float | None = None
    """What scores are multiplied with; None: 1 / √head_dim."""
    bias: bool = False
    """Biases of queries, keys and values."""
    out_bias: bool = False
    """A bias of the output."""
    sinks: bool = False
    """Each head has a learned score that takes part in the softmax and has no value (Xiao et al., 2023)."""
    temperature: Temperature | None = None
    """Scaling of queries by position."""

    def matrices(self, dim: int) -> int:
        """Elements of the matrices that a token is multiplied with."""
        return 2 * dim * (self.n_heads + self.n_kv_heads) * self.head_dim

    def parameters(self, dim: int) -> int:
        """Exact number of parameters."""
        biases = self.bias * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim + self.out_bias * dim
        norms = 2 * self.head_dim * (self.qk_norm == "before")
        return self.matrices(dim) + biases + norms + self.sinks * self.n_heads

    @property
    def score_width(self) -> int:
        """Multiplications of a query with one key and of its weight with that key's value, in all heads."""
        return 2 * self.n_heads * self.head_dim

    @property
    def rotary_width(self) -> int:
        """Width of what is turned in each head."""
        return self.head_dim

    def styles(self) -> Mapping[str, Style]:
        """How tensor parallelism treats the layer's modules, and parameters of its own; "": the layer itself."""
        heads = Columns(unit=self.head_dim)
        norms = {"q_norm": Replicated(), "k_norm": Replicated()} if self.qk_norm == "before" else {}
        sinks = {"sinks": Dealt()} if self.sinks else {}
        return {"": Gathered(), "wq": heads, "wk": heads, "wv": heads, **norms, **sinks, "wo": Rows(unit=self.head_dim)}


@dataclass(frozen=True)
class LatentShape:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one narrow vector."""

    n_heads: int
    """Heads."""
    q_rank: int
    """Width of the vector that queries come from; 0: they come from the input itself, by one matrix."""
    kv_rank: int
    """Width of the vector that keys and values come from."""
    nope_dim: int
    """Width of a head's queries and keys that has no positions."""
    rope_dim: int
    """Width of what is turned; of keys, all heads share it."""
    v_dim: int
    """Width of a head's values."""
    rope: Rope
    """Rotary positions."""
    reach: Reach = Reach()
    """Which tokens a query sees."""

    def matrices(self, dim: int) -> int:
        """Elements of the matrices that a token is multiplied with."""
        queries = self.n_heads * self.head_dim
        of_queries = self.q_rank * (dim + queries) if self.q_rank else dim * queries
        of_keys = dim * (self.kv_rank + self.rope_dim) + self.kv_rank * self.n_heads * (self.nope_dim + self.v_dim)
        return of_queries + of_keys + self.n_heads * self.v_dim * dim

    def parameters(self, dim: int) -> int:
        """Exact number of parameters."""
        return self.matrices(dim) + self.q_rank + self.kv_rank

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads, once they are made: as many as heads."""
        return self.n_heads

    @property
    def scale(self) -> float:
        """What scores are multiplied with: 1 / √head_dim, and with YaRN DeepSeek's m(mscale_all_dim)²."""
        scaling = self.rope.scaling
        weight = scaling.mscale_all_dim if isinstance(scaling, YarnScaling) else None
        sharper = yarn_mscale(scaling.factor, weight) if isinstance(scaling, YarnScaling) and weight else 1.0
        return self.head_dim**-0.5 * sharper**2

    @property
    def score_width(self) -> int:
        """As in AttentionShape."""
        return self.n_heads * (self.head_dim + self.v_dim)

    @property
    def rotary_width(self) -> int:
        """Width of what is turned in each head."""
        return self.rope_dim

    def styles(self) -> Mapping[str, Style]:
        """See AttentionShape. The narrow vectors are made on every rank from whole sequences: they are 8 % of what the
        layer computes in DeepSeek-V3, and what they spare is communication between them and the heads."""
        queries = Columns(unit=self.head_dim)
        narrow = {"wq_a": Replicated(), "q_norm": Replicated(), "wq_b": queries} if self.q_rank else {"wq": queries}
        keys = {"wkv_a": Replicated(), "kv_norm": Replicated(), "wkv_b": Columns(unit=self.nope_dim + self.v_dim)}
        return {"": Gathered(), **narrow, **keys, "wo": Rows(unit=self.v_dim)}


Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""What a gate is passed through: x·σ(x), GELU's tanh form, or GPT-OSS's clamped form (see `layers.feed_forward`)."""
CLAMP, SLOPE = 7.0, 1.702
"""The clamped form's: gates and values are held to ±CLAMP (gates from above only), and σ is taken of SLOPE · gate."""


@dataclass(frozen=True)
class FeedForwardShape:
    """A dense feed-forward layer with a gate."""

    hidden: int
    """Width between its matrices."""
    activation: Activation = "silu"
    """What the gate is passed through."""

    def matrices(self, dim: int) -> int:
        """Elements of the matrices that a token is multiplied with."""
        return 3 * dim * self.hidden

    def parameters(self, dim: int) -> int:
        """Exact number of parameters."""
        return self.matrices(dim)

    def styles(self) -> Mapping[str, Style]:
        """See AttentionShape."""
        return {"": Gathered(), "w1": Columns(), "w3": Columns(), "w2": Rows()}


@dataclass(frozen=True)
class ExpertsShape:
    """The mixture of experts that stands in place of a feed-forward layer."""

    count: int
    """Number of experts."""
    per_token: int
    """Experts that each token goes to."""
    hidden: int
    """Width between an expert's matrices."""
    normalize: bool = True
    """A token's weights are scaled to add up to 1."""
    balance_coefficient: float = 0.001
    """Weight of the balance loss; `moe.balance_coefficient` overrides it."""
    bias_rate: float = 0.0
    """Step of the selection bias, 0: it does not move; `moe.bias_rate` overrides it."""
    force_balance: bool = False
    """Experts take turns; `debug.moe_force_load_balance` sets it."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes a token's score of an expert out of the router's output."""
    groups: int = 1
    """Experts are in so many groups of the same size …"""
    top_groups: int = 1
    """… and each token's experts come from so many of them."""
    group_score: Literal["max", "top2"] = "top2"
    """What a group is chosen by: its largest score, or the sum of its two largest."""
    scale: float = 1.0
    """A token's weights are multiplied with this, after they are normalized."""
    selection_bias: bool = False
    """There is a selection bias even if it does not move."""
    shared_hidden: int = 0
    """Width of the shared expert, which sees every token; several are one of their width together. 0: none."""
    scale_input: bool = False
    """Weights multiply what goes into experts instead of what comes out, as in Llama 4."""
    router_bias: bool = False
    """A bias of the router's matrix."""
    bias: bool = False
    """Biases of the experts' matrices."""
    activation: Activation = "silu"
    """What experts' gates are passed through, the shared one's as well."""

    def __post_init__(self) -> None:
        """Raises ConfigError with all numbers that do not fit together."""
        if problems := [f"ExpertsShape: {line}" for line in self._problems()]:
            raise ConfigError(*problems)

    def _problems(self) -> Iterator[str]:
        groups, top = self.groups, self.top_groups
        if not 1 <= self.per_token <= self.count:
            yield f"per_token = {self.per_token}: must be from 1 to the number of experts, {self.count}"
        if not 1 <= top <= groups:
            yield f"top_groups = {top}: must be from 1 to the number of groups, {groups}"
        if groups < 1 or self.count % groups:
            yield f"groups = {groups}: must divide the number of experts, {self.count}"
        elif top < groups:
            size = self.count // groups
            if size * top < self.per_token <= self.count:
                held = size * top
                yield f"per_token = {self.per_token}: top_groups = {top}, of {size} experts each, have only {held}"
            if self.group_score == "top2" and size < 2:
                yield 'group_score = "top2": groups of one expert have no two scores to add up; take "max"'

    def matrices(self, dim: int, experts: int | None = None) -> int:
        """Elements of the matrices that a token is multiplied with, counting so many experts; None: those of a
        token."""
        experts = self.per_token if experts is None else experts
        return dim * self.count + 3 * dim * (experts * self.hidden + self.shared_hidden)

    def parameters(self, dim: int) -> int:
        """Exact number of parameters; selection biases are none."""
        biases = self.count * (2 * self.hidden + dim) if self.bias else 0
        return self.matrices(dim, self.count) + biases + self.router_bias * self.count

    def styles(self) -> Mapping[str, Style]:
        """See AttentionShape; the experts' own matrices are not among them."""
        shared = FeedForwardShape(self.shared_hidden).styles() if self.shared_hidden else {}
        names = {("shared." + name).rstrip("."): style for name, style in shared.items()}
        return {"router.gate": Replicated(), **names}
