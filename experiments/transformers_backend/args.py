"""The arguments of a model that a config.json describes: the file itself. Torch-free; what follows from the file is
found by `anatomy`, which needs torch and transformers, when somebody asks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.job_config import JobConfig
from components.runtime.errors import ConfigError
from components.runtime.paths import project_root

if TYPE_CHECKING:
    from experiments.transformers_backend.anatomy import Anatomy

CONFIG = "config.json"
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class HFArgs:
    """One model: what its config.json says."""

    folder: str
    """Where it was read from, for messages."""
    text: str
    """Its content, as JSON with sorted keys."""

    @property
    def config(self) -> dict[str, Any]:
        """The fields."""
        return json.loads(self.text)

    @property
    def anatomy(self) -> Anatomy:
        """What the model is made of. Raises ConfigError for what transformers cannot build, or we cannot train."""
        from experiments.transformers_backend.anatomy import examine

        return examine(self)

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""
        return self.anatomy.vocab_size

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.anatomy.layers)

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""
        return self.anatomy.parameters

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token: 6·M + 6·Σ W·K over layers, as in `DecoderArgs`.

        M: elements of the matrices that a token meets (of experts those that it goes to), without look-ups. W: the
        multiplications of a query with a key and of its weight with a value. K: keys that a query meets on average.
        """
        scores = sum(layer.width * layer.reach.mean_keys(seq_len) for layer in self.anatomy.layers)
        return 6.0 * self.anatomy.matrices + 6.0 * scores

    def problems(self, job: JobConfig) -> list[str]:
        """Why this model cannot run that job; empty if it can. Each line begins with a dotted key."""
        from experiments.transformers_backend.limits import problems

        return list(dict.fromkeys(problems(self, job)))


class Folders(Mapping[str, HFArgs]):
    """Flavors by folder: a relative path counts from the current folder, then from the project's. Not listable."""

    def __getitem__(self, flavor: str) -> HFArgs:
        """The arguments of a folder's config.json. Raises ConfigError."""
        return HFArgs(flavor, _read(flavor))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _read(flavor: str) -> str:
    key = f"model.flavor = {flavor!r}:"
    path = next((p for p in (Path(flavor) / CONFIG, project_root() / flavor / CONFIG) if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{key} no folder with a {CONFIG}; give the folder of the model that transformers shall build"
        )
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key} {path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{key} {path} is not a model's: it has no model_type")
    return json.dumps(config, sort_keys=True)
