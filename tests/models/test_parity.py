"""Every family computes what transformers computes, at random small shapes: logits, loss and every gradient in fp32,
each document of a packed row as if it were alone.
"""

import random
from pathlib import Path

import pytest

from tests.models.families import FAMILIES
from tests.models.parity import Text, require_agreement

FAST, SLOW = 2, 24
"""Shapes of a family that are drawn, in the fast set and besides."""


def agree(family: str, seed: int, tmp_path: Path) -> None:
    rng, tried = random.Random(f"{family} {seed}"), FAMILIES[family]
    args = tried.draw(rng)
    plain, packed = (rng.randint(20, 48),), tuple(rng.randint(1, 17) for _ in range(4))
    texts = (Text.of(args.vocab_size, plain), Text.of(args.vocab_size, packed))
    require_agreement(family, args, tmp_path, texts, tried.attention, seed)


@pytest.mark.parametrize("seed", range(FAST))
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_shapes(family: str, seed: int, tmp_path: Path) -> None:
    agree(family, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(FAST, SLOW))
def test_more_drawn_shapes(family: str, seed: int, tmp_path: Path) -> None:
    agree(family, seed, tmp_path)


@pytest.mark.parametrize(("family", "case"), [(name, case) for name, tried in FAMILIES.items() for case in tried.cases])
def test_named_shapes(family: str, case: str, tmp_path: Path) -> None:
    args = FAMILIES[family].cases[case]
    texts = (Text.of(args.vocab_size, (33,)), Text.of(args.vocab_size, (19, 1, 8, 12)))
    require_agreement(family, args, tmp_path, texts, FAMILIES[family].attention)
