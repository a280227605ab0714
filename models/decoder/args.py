"""The arguments that families' flavors have in common, and everything that follows from them. Torch-free, so that
`check` and the dry run's arithmetic start at once.

A family subclasses `DecoderArgs`: its defaults are the family's, and `block` says what each block is made of where
that is not the same everywhere. Counts, FLOPs and refusals follow from the blocks' shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from components.config.job_config import JobConfig
from components.layers.shapes import (
    AttentionShape,
    ExpertsShape,
    FeedForwardShape,
    LatentShape,
    NormShape,
    Rope,
    Scaling,
)
from components.parallel.pipeline_cut import cut_problems
from models.limits import (
    context_problems,
    expert_problems,
    head_problems,
    length_problems,
    one_process_problems,
    tensor_problems,
)

ORDER = ("tok_embeddings", "layers.*", "norm", "output")
"""The modules in the order in which they run: where a pipeline can cut."""


@dataclass(frozen=True)
class BlockShape:
    """One block: attention, then feed-forward or experts, each with a norm before it."""

    attention: AttentionShape | LatentShape
    """Its attention."""
    feed_forward: FeedForwardShape | ExpertsShape
    """What follows it."""
    sandwich: bool = False
    """Norms after both as well, before they are added to the residual stream, as in Gemma."""

    @property
    def experts(self) -> ExpertsShape | None:
        """Its experts; None: dense."""
        return self.feed_forward if isinstance(self.feed_forward, ExpertsShape) else None

    def parameters(self, dim: int) -> int:
        """Exact number of parameters."""
        norms = (4 if self.sandwich else 2) * dim
        return self.attention.parameters(dim) + self.feed_forward.parameters(dim) + norms


@dataclass(frozen=True, kw_only=True)
class DecoderArgs:
    """One flavor: a decoder of pre-norm blocks with rotary attention and a gated feed-forward or experts.

    What stands here describes blocks that are all alike and plain; a family overrides `block` for more.
    """

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads; divides `n_heads`."""
    head_dim: int = 0
    """Width of one head; 0: `dim / n_heads`."""
    ffn_hidden: int = 0
    """Width between the matrices of a dense feed-forward."""
    experts: ExpertsShape | None = None
    """The experts, in blocks that have them; None: all are dense."""
    vocab_size: int
    """Entries of the embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Scaling | None = None
    """Scaling of the rotary frequencies; None: plain."""
    tied_embeddings: bool = False
    """The head's matrix is the embedding's."""
    max_seq_len: int
    """Longest row, in tokens, that the flavor was made for."""
    mtp_layers: int = 0
    """Modules of multi-token prediction, each looking one token further ahead; `model.mtp_layers` overrides it."""
    depth_init: bool = True
    """Scale the initial output matrices of block i by 1/√(2(i+1)); false: all by 1/√(2·n_layers)."""

    @property
    def head_width(self) -> int:
        """Width of one head, whether it is said or follows."""
        return self.head_dim or self.dim // self.n_heads

    def block(self, layer: int) -> BlockShape:
        """What block number `layer` is made of."""
        rope = Rope(self.rope_theta, self.rope_scaling)
        attention = AttentionShape(self.n_heads, self.n_kv_heads, self.head_width, rope)
        return BlockShape(attention, self.experts or FeedForwardShape(self.ffn_hidden))

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """All blocks, in order."""
        return tuple(self.block(layer) for layer in range(self.n_layers))

    @property
    def ahead(self) -> tuple[BlockShape, ...]:
        """The blocks of multi-token prediction, which go on counting."""
        return tuple(self.block(self.n_layers + k) for k in range(self.mtp_layers))

    @property
    def norms(self) -> NormShape:
        """All norms."""
        return NormShape(self.norm_eps)

    @property
    def embedding_scale(self) -> float:
        """What embedded tokens are multiplied with."""
        return 1.0

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        blocks = sum(block.parameters(self.dim) for block in (*self.blocks, *self.ahead))
        return embeddings + blocks + self.dim + self.mtp_layers * (2 * self.dim**2 + 3 * self.dim)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a row of `seq_len` tokens: 6·M + 6·Σ W·K over blocks.

        M counts the elements of all matrices that a token is multiplied with: those of the blocks, of experts those
        that it goes to, and the head (also if tied), not the embedding, which is a look-up; a module of multi-token
        prediction has a block and a matrix of its own, and meets the head once more. Each costs a multiplication and an
        addition forward and twice that backward: 6. In each block a token's queries meet the keys, and its weights the
        values, of K earlier tokens (half of the row, or less where attention does not reach as far), W multiplications
        each (`score_width`). Norms, softmax, rotation and recomputation are not counted.
        """
        blocks = (*self.blocks, *self.ahead)
        matrices = sum(b.attention.matrices(self.dim) + b.feed_forward.matrices(self.dim) for b in blocks)
        matrices += (1 + self.mtp_layers) * self.vocab_size * self.dim + self.mtp_layers * 2 * self.dim**2
        scores = sum(b.attention.score_width * b.attention.reach.mean_keys(seq_len) for b in blocks)
        return 6.0 * matrices + 6.0 * scores

    def problems(self, job: JobConfig) -> list[str]:
        """Why this shape cannot run in that layout; empty if it can. Each line begins with a dotted key."""
        return list(dict.fromkeys(self.for_job(job)._problems(job)))

    def _problems(self, job: JobConfig) -> Iterator[str]:
        blocks = (*self.blocks, *self.ahead)
        experts = next((block.experts for block in blocks if block.experts), None)
        sizes = (experts.count, experts.hidden, self.dim if experts.bias else 0) if experts else ()
        yield from expert_problems(job, *sizes)
        for attention in dict.fromkeys(block.attention for block in blocks):
            yield from head_problems(attention.rotary_width)
            yield from tensor_problems(job, attention.n_heads, attention.n_kv_heads)
            yield from context_problems(job, attention.n_heads)
        yield from one_process_problems(job, vocab_size=self.vocab_size, ffn_hidden=self.ffn_hidden)
        yield from cut_problems(job.parallelism, ORDER, self.n_layers)
        yield from length_problems(job, self.max_seq_len)

    def for_job(self, job: JobConfig) -> Self:
        """The same shape with what the job's keys say of its experts and of multi-token prediction."""
        ahead = self.mtp_layers if job.model.mtp_layers is None else job.model.mtp_layers
        if self.experts is None:
            return replace(self, mtp_layers=ahead)
        own, coefficient, rate = self.experts, job.moe.balance_coefficient, job.moe.bias_rate
        said = replace(
            own,
            balance_coefficient=own.balance_coefficient if coefficient is None else coefficient,
            bias_rate=own.bias_rate if rate is None else rate,
            force_balance=job.debug.moe_force_load_balance,
        )
        return replace(self, experts=said, mtp_layers=ahead)
