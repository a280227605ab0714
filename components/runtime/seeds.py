"""Seeds, determinism, and the state of the random generators. A run's results never depend on the clock: without a seed
it takes 0 and says so.

Built-in models draw nothing from torch's generators (they use the counter generator of `components.mesh`); these are
seeded, saved and restored for what users bring along: dropout, a loss that samples, an augmentation in numpy. Their
state is a rank's own. It is kept as plain bytes of a fixed length, since a pickle of it would run code when loaded.
"""

import hashlib
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from components.config.job import Debug
from components.runtime.errors import ConfigError, UserError
from components.runtime.logging import logger

WORDS = 624
"""32-bit words of a Mersenne twister, which python's and numpy's generators both are."""
_PYTHON = struct.Struct(f"<{WORDS + 1}I?d")  # words and position, whether a second normal draw waits, that draw
_NUMPY = struct.Struct(f"<{WORDS}Ii?d")


def set_determinism(debug: Debug) -> int:
    """Seed the generators, switch on what `[debug]` asks for, and return the seed. Call it before anything is computed.

    Raises ConfigError for a seed that torch cannot take.
    """
    seed = debug.seed
    if seed is None:
        seed = 0
        logger.info("seed: 0, since debug.seed is not set")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"debug.seed = {seed}: allowed: 0 to {2**63 - 1}")
    _seed_all(seed)
    if debug.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with fixed workspaces
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
    return seed


def reseed(seed: int, step: int, place: int) -> None:
    """Seed the generators anew for a run that goes on after `step` as another one than was saved. Ranks with the same
    `place` draw alike."""
    digest = hashlib.sha256(f"{seed} {step} {place}".encode()).digest()
    _seed_all(int.from_bytes(digest[:8], "little") >> 1)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that it takes


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not count: the generators go on from where they were."""
    state = generator_state(device)
    yield
    set_generator_state(state, device)


def generator_state(device: torch.device) -> bytes:
    """The state of torch's generator of the CPU, of python's, of numpy's, and of torch's on an accelerator. Costs less
    than 0.1 ms. Raises UserError if numpy's generator is not the one it starts with."""
    _, words, waiting = random.getstate()
    python = _PYTHON.pack(*words, waiting is not None, waiting or 0.0)
    theirs: dict[str, Any] = np.random.get_state(legacy=False)  # pyrefly: ignore[bad-assignment]  # legacy=False gives a dict
    if theirs["bit_generator"] != "MT19937":
        raise UserError(
            f"numpy's global generator is a {theirs['bit_generator']}, whose state cannot be saved: draw from a"
            " numpy.random.Generator of your own instead of changing the global one"
        )
    twister = theirs["state"]
    numpy = _NUMPY.pack(*twister["key"].tolist(), twister["pos"], bool(theirs["has_gauss"]), theirs["gauss"])
    state = _raw(torch.get_rng_state()) + python + numpy
    return state if device.type == "cpu" else state + _raw(torch.get_device_module(device).get_rng_state(device))


def set_generator_state(state: bytes, device: torch.device) -> None:
    """Bring the generators back to a `generator_state` of the same kind of device. Raises ValueError if it is none."""
    try:
        _restore(state, device)
    except (RuntimeError, struct.error) as error:  # torch's and struct's way of saying it
        raise ValueError(str(error)) from error


def _restore(state: bytes, device: torch.device) -> None:
    length = torch.get_rng_state().nbytes
    torch.set_rng_state(_tensor(state[:length]))
    *words, waits, waiting = _PYTHON.unpack_from(state, length)
    random.setstate((3, tuple(words), waiting if waits else None))
    length += _PYTHON.size
    *key, position, waits, waiting = _NUMPY.unpack_from(state, length)
    if not 0 <= position <= WORDS:
        raise ValueError(f"position {position} in numpy's generator")  # it would read beyond its words
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(waits), waiting))
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.set_rng_state(_tensor(state[length + _NUMPY.size :]), device)


def _raw(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
