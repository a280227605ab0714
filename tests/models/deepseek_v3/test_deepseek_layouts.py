"""Latent attention, experts in groups and multi-token prediction compute in every layout what they do on one rank,
where `test_mtp` and the parity with transformers hold them against their definitions.
"""

from pathlib import Path

import pytest

from tests.layouts.facts import EXACT, Facts, differences
from tests.layouts.layout import Layout
from tests.layouts.matrix import AHEAD
from tests.layouts.run import run


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Facts]:
    """What one rank computes, filled as it is asked for."""
    return {}


@pytest.mark.parametrize(
    "layout", [pytest.param(x, id=x.name, marks=[pytest.mark.slow] if x.slow else []) for x in AHEAD]
)
def test_a_layout_computes_what_one_rank_does(layout: Layout, one_rank: dict[Layout, Facts], tmp_path: Path) -> None:
    plain = layout.reference()
    if plain not in one_rank:
        one_rank[plain] = run(plain, tmp_path / "one", {})
    want = one_rank[plain]
    assert {"mtp.0.eh_proj.weight", "mtp.0.block.attention.wkv_b.weight"} <= want.gradients.keys()
    assert differences(run(layout, tmp_path / "other", {}), want, EXACT) == []
