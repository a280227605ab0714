"""Which source comes next, so that each has its share at every moment: weights are quotas, not luck.

The rule is WF²Q, worst-case fair weighted fair queueing (Bennett and Zhang, 1996), with documents for packets: of the
sources that are not ahead of their share, the one whose next document would be through first if all were read at once,
each at its own speed. Over every prefix of the documents chosen, and within each, a source is less than the longest
document ahead of its share or behind it; the greedy choice of whoever is furthest behind, Megatron-LM's, has no such
bound for many sources. Its price: the next document of every source must be at hand, to know its length.

Sources that have ended leave, and the shares of the others are among themselves from then on.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

PER_DOCUMENT = 1 << 10
"""What a document counts where documents are the unit: so that a start can lie within one."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the same ratio; exactly what the decimals say."""
    parts = [Fraction(str(x)) for x in weights]
    scale = lcm(*(x.denominator for x in parts))
    return [int(x * scale) for x in parts]


def choose(served: Sequence[int], lengths: Sequence[int | None], weights: Sequence[int]) -> int | None:
    """The source that comes next; None if all have ended.

    Args:
        served: What each source has given so far, in tokens or in other units of a document's length.
        lengths: Of each source's next document, in the same unit; None: it has ended.
        weights: Shares, as positive integers.
    """
    if len(lengths) == 1:
        return None if lengths[0] is None else 0
    active = [d for d, length in enumerate(lengths) if length is not None]
    if not active:
        return None
    total, weight = sum(served[d] for d in active), sum(weights[d] for d in active)
    best: int | None = None
    for d in active:
        if served[d] * weight <= total * weights[d] and (best is None or _first(d, best, served, lengths, weights)):
            best = d
    return best


def _first(a: int, b: int, served: Sequence[int], lengths: Sequence[int | None], weights: Sequence[int]) -> bool:
    """Whether source `a` would be through with its next document before `b`."""
    return (served[a] + (lengths[a] or 0)) * weights[b] < (served[b] + (lengths[b] or 0)) * weights[a]
