"""Experts that are dealt to ranks give every loss, gradient and selection bias that one rank gives."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.config.compute import ActivationCheckpoint
from components.config.job_config import JobConfig
from components.layers.moe import MoE
from components.mesh.batch import IGNORE, Batch
from components.mesh.collectives import all_reduce
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.data import set_gradient_sync
from models.qwen3.args import Experts, Qwen3Args
from models.qwen3.spec import load
from tests.ranks import run_ranks
from trainer.build import build_stages

EXPERTS = Experts(count=4, per_token=2, hidden=12, balance_coefficient=0.05, bias_rate=0.01)
ARGS = Qwen3Args(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=37, experts=EXPERTS)
ROWS, SEQ = 8, 12


@dataclass(frozen=True)
class Case:
    """A layout and what it runs."""

    degrees: Degrees
    args: Qwen3Args = ARGS
    microbatch: int = 8
    job: JobConfig = field(default_factory=JobConfig)
    gate: float = 1.0
    """Routers' weights are multiplied by this: the larger, the more uneven the routing."""
    closed: tuple[int, ...] = ()
    """Experts that no token goes to."""
    steps: int = 1


def data() -> Batch:
    tokens = torch.randint(0, ARGS.vocab_size, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : row * 5 % SEQ] = IGNORE
    return Batch(tokens[:, :-1], labels, torch.arange(SEQ).expand(ROWS, SEQ), torch.zeros(ROWS, SEQ))


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def steer(model: nn.Module, case: Case) -> None:
    """Make routing uneven: scale gates, and keep tokens away from experts."""
    for module in model.modules():
        if isinstance(module, MoE):
            gate = module.router.gate.weight
            local = gate.to_local() if isinstance(gate, DTensor) else gate
            with torch.no_grad():
                local.mul_(case.gate)
            if module.expert_bias is not None:
                module.expert_bias[list(case.closed)] = -10.0


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")}


def step(case: Case) -> dict[str, Tensor]:
    """The plain loss, every gradient and bias of steps over all rows, each rank taking its own."""
    dims = ParallelDims.build(case.degrees, "cpu")
    job = replace(case.job, activation_checkpoint=case.job.activation_checkpoint)
    spec = load()
    model: Any = build_stages(spec, case.args, job, dims, torch.device("cpu"), torch.float32, seed=3)[0].module
    steer(model, case)
    optimizers = spec.build_optimizers_fn([model], job, torch.device("cpu"))
    found: dict[str, Tensor] = {}
    valid = (data().labels != IGNORE).sum()
    for number in range(case.steps):
        optimizers.zero_grad()
        mine = data().map(lambda x: x[dims.data_rank :: dims.data_degree])
        pieces = [mine.slice(i, i + case.microbatch) for i in range(0, mine.rows, case.microbatch)]
        total = torch.zeros(())
        for index, part in enumerate(pieces):
            set_gradient_sync(model, index == len(pieces) - 1)
            hidden = model(part.tokens, part.positions, None, (part.labels != IGNORE) / valid)
            logits = model.output(hidden)
            logits = logits if isinstance(logits, Tensor) else logits.full_tensor()
            loss = F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), ignore_index=IGNORE, reduction="sum")
            (loss / valid).backward()
            total += loss.detach() / valid
        found[f"{number}.loss"] = all_reduce(total, dims.axis("loss"))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            found[f"{number}.{name}"] = whole(parameter.grad)
        optimizers.step()
        found |= {f"{number}.{name}": bias for name, bias in biases(model).items()}
    return found


NOTHING = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="none"))


def check(case: Case, reference: Case | None = None) -> dict[str, Tensor]:
    """Every number of the layout is that of one process; what that gave."""
    expected = step(reference or replace(case, degrees=Degrees(), microbatch=ROWS, job=NOTHING))
    norm = torch.stack([value.norm() for name, value in expected.items() if name.startswith("0.layers")]).norm()
    for found in run_ranks(case.degrees.world, step, case):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "expert_bias" in name:
                assert torch.equal(found[name], value), name
            elif "0." in name[:2]:
                assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * norm), name
    return expected


LAYOUTS = {
    "ep 2": Degrees(dp_shard=2, ep=2),
    "ep 4": Degrees(dp_shard=4, ep=4),
    "fsdp 2": Degrees(dp_shard=2),
    "fsdp 2 x ep 2": Degrees(dp_shard=4, ep=2),
    "hsdp 2 x ep 2": Degrees(dp_replicate=2, dp_shard=2, ep=2),
    "tp 2": Degrees(tp=2),
    "tp 2, etp 2": Degrees(tp=2, etp=2),
    "tp 2 as ep 2": Degrees(tp=2, ep=2),
    "fsdp 2 x tp 2, ep 2": Degrees(dp_shard=2, tp=2, ep=2),
    "fsdp 2 x tp 2, ep 4": Degrees(dp_shard=2, tp=2, ep=4),
    "fsdp 2 x tp 2, ep 2, etp 2": Degrees(dp_shard=2, tp=2, ep=2, etp=2),
    "hsdp 2 x tp 2, ep 2": Degrees(dp_replicate=2, tp=2, ep=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(name: str) -> None:
    check(Case(LAYOUTS[name], microbatch=1, job=NOTHING))
