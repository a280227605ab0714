"""Seeds and determinism. A run's results never depend on the clock: without a seed it takes 0 and says so.

Built-in models draw nothing from torch's generator (they use the counter generator of `components.mesh`); it is seeded
for what users bring along.
"""

import os

import torch

from components.config.job import Debug
from components.runtime.errors import ConfigError
from components.runtime.logging import logger


def set_determinism(debug: Debug) -> int:
    """Seed torch, switch on what `[debug]` asks for, and return the seed. Call it before anything is computed.

    Raises ConfigError for a seed that torch cannot take.
    """
    seed = debug.seed
    if seed is None:
        seed = 0
        logger.info("seed: 0, since debug.seed is not set")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"debug.seed = {seed}: allowed: 0 to {2**63 - 1}")
    torch.manual_seed(seed)
    if debug.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with fixed workspaces
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
    return seed
