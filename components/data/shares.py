"""Shares such as "98,1,1" of the documents in file order: the first for training, the second for validation.

Megatron-LM's rule, to the last document: shares are divided by their sum, and part i is documents round(N·lo) to
round(N·hi), where lo and hi are the running sums before and after it. Documents are not shuffled first, so that what
is held out does not depend on a seed; a corpus that is sorted by origin should be shuffled when it is written.
Imports nothing, so that a job can be checked by it.
"""

import re
from math import isfinite

from components.runtime.errors import ConfigError

NAMES = ("training", "validation", "test")
"""What parts 0, 1 and 2 are for."""


def is_shares(split: str) -> bool:
    """Whether a split is meant as shares, rather than as the name of a split."""
    return re.search(r"^\s*[-+.\d]|,", split) is not None


def parse_shares(split: str, key: str) -> list[float]:
    """Up to three shares, divided by their sum; those that are missing are 0. Raises ConfigError naming the key."""
    allowed = 'allowed: up to three numbers, not negative and not all 0, such as "98,1,1"'
    try:
        shares = [float(x) for x in split.split(",")]
    except ValueError:
        raise ConfigError(f"{key} = {split!r}: not shares; {allowed}") from None
    if len(shares) > len(NAMES):
        raise ConfigError(f"{key} = {split!r}: {len(shares)} shares; {allowed}")
    if not all(isfinite(x) and x >= 0 for x in shares) or not any(shares):
        raise ConfigError(f"{key} = {split!r}: no shares of a whole; {allowed}")
    whole = sum(shares)
    return [x / whole for x in (*shares, *[0.0] * (len(NAMES) - len(shares)))]


def share_bounds(split: str, part: int, count: int, key: str) -> tuple[int, int]:
    """First item of a part of `count`, and the one after its last. Raises ConfigError for shares that are none."""
    shares = parse_shares(split, key)
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    return round(edges[part] * count), round(edges[part + 1] * count)
