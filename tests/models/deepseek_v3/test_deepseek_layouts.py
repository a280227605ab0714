"""Latent attention, experts in groups and multi-token prediction compute in every layout what they do on one rank,
where `test_mtp` and the parity with transformers hold them against their definitions.
"""

from pathlib import Path

import pytest

from tests.layouts.facts import EXACT, Facts, differences
from tests.layouts.layout import Layout
from tests.layouts.run import run

FAST = (
    Layout("deepseek/moe", "fsdp=2 ep=2", "recompute always"),
    Layout("deepseek/moe", "tp=2"),
    Layout("deepseek/moe", "cp=2"),
    Layout("deepseek/moe", "pp=2", "chunked"),
)
SLOW = (
    Layout("deepseek/moe", "ddp=2", "accumulate by-op"),
    Layout("deepseek/moe", "fsdp=2", "offload never"),
    Layout("deepseek/moe", "fsdp=2", "compile"),
    Layout("deepseek/dense", "fsdp=2", "compile chunked"),
    Layout("deepseek/dense", "tp=2", "compile"),
    Layout("deepseek/dense", "tp=4", "gathered-logits"),
    Layout("deepseek/moe", "tp=2 ep=2", "accumulate selective"),
    Layout("deepseek/moe", "fsdp=2 tp=2 ep=2 etp=2"),
    Layout("deepseek/moe", "cp=2 balance=none", "causal"),
    Layout("deepseek/moe", "cp=2 rotate=alltoall"),
    Layout("deepseek/moe", "cp=2 rotate=alltoall", "causal"),
    Layout("deepseek/moe", "cp=2 rotate=ulysses"),
    Layout("deepseek/moe", "tp=2 cp=2 rotate=ulysses ep=4"),
    Layout("deepseek/dense", "pp=2 schedule=Interleaved1F1B"),
    Layout("deepseek/moe", "pp=2 schedule=ZBVZeroBubble"),
    Layout("deepseek/moe", "fsdp=2 pp=2 ep=2", "always"),
    Layout("deepseek/moe", "tp=2 cp=2 pp=2"),
    Layout("deepseek/dense", 'pp=2 parts=[["tok_embeddings","layers.0","layers.1","layers.2","norm"],["output"]]'),
    Layout("deepseek/even", "tp=2", "local-tensor"),
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Facts]:
    """What one rank computes, filled as it is asked for."""
    return {}


@pytest.mark.parametrize(
    "layout", [pytest.param(x, id=x.name, marks=[pytest.mark.slow] if x in SLOW else []) for x in (*FAST, *SLOW)]
)
def test_a_layout_computes_what_one_rank_does(layout: Layout, one_rank: dict[Layout, Facts], tmp_path: Path) -> None:
    plain = layout.reference()
    if plain not in one_rank:
        one_rank[plain] = run(plain, tmp_path / "one", {})
    want = one_rank[plain]
    assert {"mtp.0.eh_proj.weight", "mtp.0.block.attention.wkv_b.weight"} <= want.gradients.keys()
    assert differences(run(layout, tmp_path / "other", {}), want, EXACT) == []
