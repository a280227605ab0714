"""Whole compiled jobs: all blocks of a rank share one artifact, however they are laid out.

Data and tensor parallelism have this test beside their appliers.
"""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, call, meeting_point

P = "--parallelism"
LLAMA = ("--model.flavor=deep",)
QWEN = ("--experimental.custom_import=tests.models.qwen3.tiny", "--model.name=tiny_qwen3", "--model.flavor=moe")
LAYOUTS = {
    **{
        f"context, {method}": (*LLAMA, f"{P}.context_parallel_degree=2", f"{P}.context_parallel_rotate_method={method}")
        for method in ("alltoall", "ulysses")
    },
    "two stages on each rank": (
        *LLAMA,
        f"{P}.pipeline_parallel_degree=2",
        f"{P}.pipeline_parallel_schedule=Interleaved1F1B",
        "--training.local_batch_size=2",
    ),
    "expert": (*QWEN, f"{P}.expert_parallel_degree=2"),
    "tensor and expert": (*QWEN, f"{P}.tensor_parallel_degree=2", f"{P}.expert_parallel_degree=2"),
}


def graphs(argv: list[str], environ: dict[str, str]) -> int:
    """How many graphs dynamo has made for a job."""
    from torch._dynamo.utils import counters

    outcome = call(argv, environ)
    assert outcome.code == 0, outcome.stderr
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_share_one_artifact(name: str, tmp_path: Path) -> None:
    """One graph; with experts one for each piece that the uncompiled dispatch leaves: no more for two blocks than for
    one."""
    compiled = ("--compile.enable", "--compile.backend=aot_eager", "--compile.components=model", "--training.steps=2")
    argv = [*TINY, f"--job.dump_folder={tmp_path}", "--data.document_mask", *compiled, *LAYOUTS[name]]
    found = run_ranks(2, graphs, argv, meeting_point(), backend=None, timeout=120)
    assert found == [4 if LAYOUTS[name][: len(QWEN)] == QWEN else 1] * 2
