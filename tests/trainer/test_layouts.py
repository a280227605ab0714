"""A layout is how a job runs, never what it computes: whole jobs on 1, 2 and 4 ranks, compared number by number."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, facts, meeting_point, train

STEPS = 10
SHARD, REPLICATE = "--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"
LAYOUTS = {
    "one rank, accumulation": (1, ()),
    "one rank, no accumulation": (1, ("--training.local_batch_size=12",)),
    "FSDP 2": (2, ()),
    "FSDP 4": (4, ("--training.local_batch_size=3",)),
    "FSDP 2, kept gathered": (2, ("--parallelism.fsdp_reshard_after_forward=never", "--training.local_batch_size=2")),
    "DDP 2": (2, (f"{REPLICATE}=2", "--training.local_batch_size=3")),
    "DDP 4": (4, (f"{REPLICATE}=4",)),
    "HSDP 2 x 2": (4, (f"{REPLICATE}=2", f"{SHARD}=2")),
    "FSDP 2, offloaded": (2, ("--training.enable_cpu_offload",)),
    "workers": (2, ("--training.dataloader.num_workers=2",)),
    "full recompute": (2, ("--activation_checkpoint.mode=full",)),
    "recompute by op": (
        1,
        ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    ),
    "chunked loss": (2, ("--loss.name=chunked_cross_entropy", "--loss.chunk_tokens=7")),
    "foreach optimizer": (1, ("--optimizer.implementation=foreach",)),
}
COMMON = (
    f"--training.steps={STEPS}",
    "--data.document_mask",
    "--validation.enable",
    "--validation.dataset=c4_test",
    "--validation.seq_len=20",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=4",
    "--validation.steps=3",
    "--validation.freq=5",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(1, tmp_path_factory.mktemp("reference"), *COMMON, "--training.local_batch_size=4")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_numbers(name: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    found = train(ranks, tmp_path, *COMMON, *arguments)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for mine, theirs in zip(found, reference, strict=True):
        assert facts(mine) == pytest.approx(facts(theirs), rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]
        assert mine.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-5)
    assert "validation_loss" in found[4]
    assert "validation_loss" in found[9]
    assert 12 * 24 * STEPS * 0.8 < found[-1]["tokens"] < 12 * 24 * STEPS  # borders between documents are not counted


def gradients(argv: list[str], environ: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each parameter's first gradient before clipping, and its value after the last step, whole."""
    os.environ.update(environ)
    from components.runtime.world import World
    from trainer.command import import_custom
    from trainer.config.load import load_job
    from trainer.trainer import Trainer

    def whole(value: Tensor) -> Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    class Watching(Trainer):
        first: dict[str, Tensor]

        def accept(self, loss: float, grad_norm: float, local_sums: Tensor) -> bool:
            if self.progress.step == 1:
                named = self.models[0].named_parameters()
                self.first = {name: whole(p.grad) for name, p in named if p.grad is not None}
            return super().accept(loss, grad_norm, local_sums)

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Watching(resolved, os.environ)
    trainer.train()
    values = {name: whole(p) for name, p in trainer.models[0].named_parameters()}
    assert World.from_environ(os.environ).size == trainer.world.size
    return trainer.first, values


@pytest.mark.parametrize("flavor", ["untied", "tied"])
@pytest.mark.parametrize(
    ("ranks", "arguments"), [(2, ()), (4, (f"{REPLICATE}=2",)), (2, (f"{REPLICATE}=2",))], ids=["FSDP", "HSDP", "DDP"]
)
def test_every_gradient_and_every_update_is_the_same(
    ranks: int, arguments: tuple[str, ...], flavor: str, tmp_path: Path
) -> None:
    common = [*TINY, f"--model.flavor={flavor}", "--data.document_mask"]
    environ = meeting_point()
    alone = [*common, "--training.local_batch_size=12", f"--job.dump_folder={tmp_path}/a"]
    together = [*common, *arguments, f"--job.dump_folder={tmp_path}/b"]
    (want, final), *_ = run_ranks(1, gradients, alone, environ, backend=None)
    (got, ended), *_ = run_ranks(ranks, gradients, together, environ, backend=None)
    assert got.keys() == want.keys()
    assert ("output.weight" in want) == (flavor == "untied")
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), name
        assert (ended[name] - final[name]).norm() <= 1e-5 * final[name].norm(), name


def test_bf16_stays_close_and_is_the_same_mechanism_everywhere(tmp_path: Path) -> None:
    low = ("--training.mixed_precision_param=bfloat16", "--training.steps=3")
    exact = train(1, tmp_path / "fp32", "--training.steps=3")
    one = train(1, tmp_path / "one", *low)
    two = train(2, tmp_path / "two", *low)
    for a, b, c in zip(exact, one, two, strict=True):
        assert b["loss"] != a["loss"]
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)
        assert c["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert c["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


def test_compiled_numbers_are_the_eager_ones(tmp_path: Path) -> None:
    eager = train(1, tmp_path / "eager", "--data.document_mask")
    for ranks in (1, 2):
        compiled = ("--data.document_mask", "--compile.enable", "--compile.backend=aot_eager")
        found = train(ranks, tmp_path / str(ranks), *compiled)
        assert [facts(record) for record in found] == [pytest.approx(facts(record), rel=1e-5) for record in eager]
