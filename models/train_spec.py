"""TrainSpec: the one thing a model family hands to the Trainer, and the registry it is looked up in.

Two steps, so that `check` and `--help` need no torch: a registry entry is a Family (name, flavors, `load`), which is
torch-free; `load()` imports the model and returns the TrainSpec. Defaults import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from components.config.job_config import JobConfig
from components.mesh.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from components.mesh.parallel_dims import ParallelDims


class ModelArgs(Protocol):
    """A flavor's shape: torch-free, frozen, comparable. Every family's arguments have at least these."""

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a row of `seq_len`, causal attention counted half."""

    def problems(self, job: JobConfig) -> list[str]:
        """Why this shape cannot run in that layout; empty if it can. Names the keys and the numbers."""
