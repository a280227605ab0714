"""The shapes of the Qwen3 family. Torch-free, so that `check` and the dry run's arithmetic start at once.

Dense flavors and mixture-of-experts flavors are one dataclass: they differ in the feed-forward part of a block alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.config.job_config import JobConfig
from components.parallel.pipeline_cut import cut_problems
from models.limits import context_problems, expert_problems, head_problems, one_process_problems, tensor_problems

ORDER = ("tok_embeddings", "layers.*", "norm", "output")
"""The modules in the order in which they run: where a pipeline can cut."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands in place of each feed-forward layer."""

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
    """Step of the selection bias, 0: none; `moe.bias_rate` overrides it."""
    force_balance: bool = False
    """Experts take turns; `debug.moe_force_load_balance` sets it."""


@dataclass(frozen=True)
class Qwen3Args:
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention, whose queries and keys are normed
    in each head, and SwiGLU or a mixture of SwiGLU experts; no biases."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads; divides `n_heads`."""
    ffn_hidden: int = 0
    """Width between the feed-forward's matrices; of no use with experts."""
    experts: Experts | None = None
    """The experts; None: dense."""
    head_dim: int = 128
    """Width of one head, whatever `dim` is."""
    vocab_size: int = 151936
    """Entries of the embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    tied_embeddings: bool = False
    """The head's matrix is the embedding's."""
    max_seq_len: int = 40960
    """Longest row, in tokens, that the family was made for."""
    depth_init: bool = True
    """Scale the initial output matrices of block i by 1/√(2(i+1)); false: all by 1/√(2·n_layers)."""

    @property
    def n_experts(self) -> int:
        """Number of experts; 0 for a dense flavor."""
        return self.experts.count if self.experts else 0

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        norms = self.n_layers * (2 * self.dim + 2 * self.head_dim) + self.dim
        return embeddings + norms + self.n_layers * self._block_matrices(self.n_experts)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a row of `seq_len` tokens.

        6·M + 6·n_layers·(n_heads·head_dim)·seq_len, as for Llama 3 (see there), where M counts the elements of all
        matrices that a token is multiplied with: of experts those that it goes to, and the router.
        """
        active = self.experts.per_token if self.experts else 0
        matrices = self.n_layers * self._block_matrices(active) + self.vocab_size * self.dim
        return 6.0 * matrices + 6.0 * self.n_layers * self.n_heads * self.head_dim * seq_len

    def problems(self, job: JobConfig) -> list[str]:
        """Why this shape cannot run in that layout; empty if it can. Each line begins with a dotted key."""
        found = [*expert_problems(job, self.n_experts, self.experts.hidden if self.experts else 0)]
        found += head_problems(self.head_dim)
        found += tensor_problems(job, self.n_heads, self.n_kv_heads)
        found += one_process_problems(job, vocab_size=self.vocab_size, ffn_hidden=self.ffn_hidden)
        found += context_problems(job, self.n_heads)
        found += cut_problems(job.parallelism, ORDER, self.n_layers)
        lengths = {"training.seq_len": job.training.seq_len}
        if job.validation.enable:
            lengths["validation.seq_len"] = job.validation.seq_len
        return found + [
            f"{key} = {length}: longer than the {self.max_seq_len} tokens this qwen3 flavor was made for; shorten it"
            for key, length in lengths.items()
            if length > self.max_seq_len
        ]

    def for_job(self, job: JobConfig) -> "Qwen3Args":
        """The same shape with what the job's keys say of its experts."""
        if self.experts is None:
            return self
        own, coefficient, rate = self.experts, job.moe.balance_coefficient, job.moe.bias_rate
        said = replace(
            own,
            balance_coefficient=own.balance_coefficient if coefficient is None else coefficient,
            bias_rate=own.bias_rate if rate is None else rate,
            force_balance=job.debug.moe_force_load_balance,
        )
        return replace(self, experts=said)

    def _block_matrices(self, experts: int) -> int:
        """Elements of a block's matrices, counting so many of its experts."""
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        if self.experts is None:
            return attention + 3 * self.dim * self.ffn_hidden
        return attention + self.dim * self.experts.count + experts * 3 * self.dim * self.experts.hidden


_SMALL = Qwen3Args(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_hidden=768, head_dim=48, vocab_size=2048)

FLAVORS: Mapping[str, Qwen3Args] = MappingProxyType(
    {
        "debugmodel": _SMALL,
        "debugmodel_moe": replace(_SMALL, ffn_hidden=0, experts=Experts(count=16, per_token=4, hidden=192)),
        "0.6B": Qwen3Args(dim=1024, n_layers=28, n_heads=16, n_kv_heads=8, ffn_hidden=3072, tied_embeddings=True),
        "1.7B": Qwen3Args(dim=2048, n_layers=28, n_heads=16, n_kv_heads=8, ffn_hidden=6144, tied_embeddings=True),
        "4B": Qwen3Args(dim=2560, n_layers=36, n_heads=32, n_kv_heads=8, ffn_hidden=9728, tied_embeddings=True),
        "8B": Qwen3Args(dim=4096, n_layers=36, n_heads=32, n_kv_heads=8, ffn_hidden=12288),
        "14B": Qwen3Args(dim=5120, n_layers=40, n_heads=40, n_kv_heads=8, ffn_hidden=17408),
        "32B": Qwen3Args(dim=5120, n_layers=64, n_heads=64, n_kv_heads=8, ffn_hidden=25600),
        "30B-A3B": Qwen3Args(
            dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, experts=Experts(count=128, per_token=8, hidden=768)
        ),
        "235B-A22B": Qwen3Args(
            dim=4096, n_layers=94, n_heads=64, n_kv_heads=4, experts=Experts(count=128, per_token=8, hidden=1536)
        ),
    }
)
