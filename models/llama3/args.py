"""The shapes of the Llama 3 family. Torch-free, so that `check` and the dry run's arithmetic start at once.

Every number is written out. Meta's own files give the feed-forward width through `multiple_of` and
`ffn_dim_multiplier`; that spares one number per flavor and costs the reader a calculation with three roundings, so it
was rejected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from components.config.job_config import JobConfig
from components.parallel.pipeline_cut import cut_problems
from models.limits import context_problems, expert_problems, head_problems, one_process_problems, tensor_problems

ORDER = ("tok_embeddings", "layers.*", "norm", "output")
"""The modules in the order in which they run: where a pipeline can cut."""


@dataclass(frozen=True)
class RopeScaling:
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
class Llama3Args:
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention and SwiGLU, no biases."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads; each is `dim / n_heads` wide."""
    n_kv_heads: int
    """Key and value heads; divides `n_heads`."""
    ffn_hidden: int
    """Width between the feed-forward's matrices."""
    vocab_size: int = 128256
    """Entries of the embedding."""
    norm_eps: float = 1e-5
    """Added to the mean square in each norm."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies; None: plain."""
    tied_embeddings: bool = False
    """The head's matrix is the embedding's."""
    max_seq_len: int = 131072
    """Longest row, in tokens, that the family was made for."""
    depth_init: bool = True
    """Scale the initial output matrices of block i by 1/√(2(i+1)); false: all by 1/√(2·n_layers)."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        norms = (2 * self.n_layers + 1) * self.dim
        return embeddings + norms + self.n_layers * self._block_matrices()

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a row of `seq_len` tokens.

        6·M + 6·n_layers·(n_heads·head_dim)·seq_len, where M counts the elements of all matrices that a token is
        multiplied with: those of the blocks and the head (also if tied), not the embedding, which is a look-up.

        Each element of M costs a multiplication and an addition forward and twice that backward: 6. In attention a
        token meets seq_len keys and seq_len values in each block: 4·(n_heads·head_dim)·seq_len FLOPs forward, 12 with
        backward, and a causal mask lets half of that count. Norms, softmax, rotation and recomputation are not
        counted.
        """
        matrices = self.n_layers * self._block_matrices() + self.vocab_size * self.dim
        return 6.0 * matrices + 6.0 * self.n_layers * self.n_heads * self.head_dim * seq_len

    def problems(self, job: JobConfig) -> list[str]:
        """Why this shape cannot run in that layout; empty if it can. Each line begins with a dotted key."""
        found = [
            *head_problems(self.head_dim),
            *expert_problems(job),
            *tensor_problems(job, self.n_heads, self.n_kv_heads),
        ]
        found += one_process_problems(job, vocab_size=self.vocab_size, ffn_hidden=self.ffn_hidden)
        found += context_problems(job, self.n_heads)
        found += cut_problems(job.parallelism, ORDER, self.n_layers)
        lengths = {"training.seq_len": job.training.seq_len}
        if job.validation.enable:
            lengths["validation.seq_len"] = job.validation.seq_len
        found += [self._too_long(key, length) for key, length in lengths.items() if length > self.max_seq_len]
        return found

    def _block_matrices(self) -> int:
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        return attention + 3 * self.dim * self.ffn_hidden

    def _too_long(self, key: str, length: int) -> str:
        return (
            f"{key} = {length}: longer than the {self.max_seq_len} tokens this llama3 flavor was made for; shorten it"
        )


FLAVORS: Mapping[str, Llama3Args] = MappingProxyType(
    {
        "debugmodel": Llama3Args(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_hidden=768, vocab_size=2048),
        "1B": Llama3Args(
            dim=2048,
            n_layers=16,
            n_heads=32,
            n_kv_heads=8,
            ffn_hidden=8192,
            rope_scaling=RopeScaling(factor=32.0),
            tied_embeddings=True,
        ),
        "3B": Llama3Args(
            dim=3072,
            n_layers=28,
            n_heads=24,
            n_kv_heads=8,
            ffn_hidden=8192,
            rope_scaling=RopeScaling(factor=32.0),
            tied_embeddings=True,
        ),
        "8B": Llama3Args(
            dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_hidden=14336, rope_scaling=RopeScaling(factor=8.0)
        ),
        "70B": Llama3Args(
            dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_hidden=28672, rope_scaling=RopeScaling(factor=8.0)
        ),
        "405B": Llama3Args(
            dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_hidden=53248, rope_scaling=RopeScaling(factor=8.0)
        ),
    }
)
