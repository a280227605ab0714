"""Experts that are dealt to ranks give every loss, gradient and selection bias that one rank gives."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from components.config.compute import ActivationCheckpoint, Compile
from components.config.job_config import JobConfig
from components.layers.initialize import Normal
from components.layers.moe import MoE
from components.layers.shapes import ExpertsShape
from components.mesh.batch import IGNORE, Batch
from components.mesh.collectives import all_reduce
from components.mesh.counter import derive_key, fill_
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.context import split_sequence
from components.parallel.data import set_gradient_sync
from components.parallel.pipeline import _costs
from components.parallel.pipeline_cut import Modules
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan
from models.qwen3.args import Qwen3Args
from models.qwen3.spec import load
from tests.ranks import RankError, run_ranks
from trainer.build import build_stages

EXPERTS = ExpertsShape(count=4, per_token=2, hidden=12, balance_coefficient=0.05, bias_rate=0.01)
ARGS = Qwen3Args(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=37, experts=EXPERTS)
VARIANTS = {
    "deepseek": replace(
        EXPERTS, count=8, per_token=3, score="sigmoid", groups=4, top_groups=2, scale=2.5, shared_hidden=10
    ),
    "gpt-oss": replace(EXPERTS, router_bias=True, bias=True, activation="clamped_swiglu"),
    "llama4": replace(EXPERTS, per_token=1, score="sigmoid", normalize=False, scale_input=True, shared_hidden=10),
    "two weighted inputs": replace(EXPERTS, score="sigmoid", scale_input=True, bias=True),
}
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
    """Make routing uneven: scale gates, and keep tokens away from experts. And give biases values that show."""
    for name, parameter in model.named_parameters():
        if ".moe." in name and name.rpartition(".")[2] in ("b1", "b2", "b3", "bias"):
            fill_(parameter, derive_key(0, "steer", name), Normal(0.5).draw)
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
    job = case.job
    spec = load()
    model: Any = build_stages(spec, case.args, job, dims, torch.device("cpu"), torch.float32, seed=3)[0].module
    steer(model, case)
    optimizers = spec.build_optimizers_fn([model], job, torch.device("cpu"))
    found: dict[str, Tensor] = {}
    valid = (data().labels != IGNORE).sum()
    for number in range(case.steps):
        optimizers.zero_grad()
        mine = data().map(lambda x: x[dims.data_rank :: dims.data_degree])
        mine = split_sequence(mine, dims.axis("cp"), job.parallelism)
        pieces = [mine.slice(i, i + case.microbatch) for i in range(0, mine.rows, case.microbatch)]
        total = torch.zeros(())
        for index, part in enumerate(pieces):
            set_gradient_sync(model, index == len(pieces) - 1)
            hidden = model(part.tokens, part.positions, None, (part.labels != IGNORE) / valid)
            logits = model.output(hidden)
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
FULL = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="full"))
OP = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="selective", selective_ac_option="op"))
COMPILED = replace(NOTHING, compile=Compile(enable=True, components=["model"], backend="aot_eager"))


@functools.cache
def reference(args: Qwen3Args, gate: float, closed: tuple[int, ...], steps: int) -> dict[str, Tensor]:
    """One process, all rows at once."""
    return step(Case(Degrees(), args, ROWS, NOTHING, gate, closed, steps))


def check(case: Case) -> dict[str, Tensor]:
    """Every number of the layout is that of the reference; what that gave."""
    expected = reference(case.args, case.gate, case.closed, case.steps)
    norm = torch.stack([value.norm() for name, value in expected.items() if name.startswith("0.layers")]).norm()
    for found in run_ranks(case.degrees.world, step, case):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "expert_bias" in name:
                assert torch.equal(found[name], value), name
            elif name.startswith("0."):
                assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * norm), name
            else:
                assert (found[name] - value).norm() <= 1e-3 * max(value.norm(), 1e-3 * norm), name
    return expected


slow = pytest.mark.slow
LAYOUTS = {
    "ep 2": Degrees(dp_shard=2, ep=2),
}
MORE = {
    "fsdp 2 x ep 2": Degrees(dp_shard=4, ep=2),
    "hsdp 2 x ep 2": Degrees(dp_replicate=2, dp_shard=2, ep=2),
    "cp 2 x tp 2, ep 4": Degrees(cp=2, tp=2, ep=4),
    "fsdp 2 x tp 2, ep 2, etp 2": Degrees(dp_shard=2, tp=2, ep=2, etp=2),
    "tp 2": Degrees(tp=2),
    "fsdp 2": Degrees(dp_shard=2),
    "ep 4": Degrees(dp_shard=4, ep=4),
    "tp 2, etp 2": Degrees(tp=2, etp=2),
    "tp 2, ep 2": Degrees(tp=2, ep=2),
    "tp 4": Degrees(tp=4),
    "cp 2, ep 2": Degrees(cp=2, ep=2),
    "fsdp 2 x tp 2, ep 2": Degrees(dp_shard=2, tp=2, ep=2),
    "fsdp 2 x tp 2, ep 4": Degrees(dp_shard=2, tp=2, ep=4),
    "hsdp 2 x tp 2, ep 2": Degrees(dp_replicate=2, tp=2, ep=2),
    "hsdp 2 x fsdp 2 x tp 2, ep 2, etp 2": Degrees(dp_replicate=2, dp_shard=2, tp=2, ep=2, etp=2),
    "fsdp 2 x cp 2 x tp 2, ep 4": Degrees(dp_shard=2, cp=2, tp=2, ep=4),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=slow) for name in MORE)])
def test_layouts_agree(name: str) -> None:
    """Accumulated over rows, with a balance loss; the bias that follows is the same, bit for bit."""
    check(Case((LAYOUTS | MORE)[name], microbatch=1, job=NOTHING))


VARIED = [
    ("deepseek", "tp 2, ep 2"),
    ("gpt-oss", "tp 2, etp 2"),
    ("llama4", "tp 2, ep 2"),
]
MORE_VARIED = [
    *((name, "fsdp 2 x tp 2, ep 2, etp 2") for name in VARIANTS),
    *((name, "tp 2") for name in VARIANTS),
    ("deepseek", "cp 2 x tp 2, ep 4"),
    ("deepseek", "fsdp 2"),
    ("gpt-oss", "hsdp 2 x ep 2"),
]


@pytest.mark.parametrize(("variant", "name"), [*VARIED, *(pytest.param(*case, marks=slow) for case in MORE_VARIED)])
def test_layouts_agree_on_every_kind_of_experts(variant: str, name: str) -> None:
    """Groups and sigmoids, biases and shared experts, weighted inputs: parameters that are cut in ways of their own.
    Recomputed by op, so that FSDP's hooks must do the same each time."""
    args = replace(ARGS, experts=VARIANTS[variant])
    found = check(Case((LAYOUTS | MORE)[name], args, microbatch=4, job=OP, steps=2))
    unmoved = [name for name, value in found.items() if name.startswith("0.") and not value.any()]
    assert not unmoved


UNEVEN = Case(Degrees(dp_shard=2, ep=2), microbatch=2, gate=40.0, closed=(0, 1), steps=2)
"""Sharp routing; the first rank's experts get no token; the second step has the biases and weights of the first."""


@pytest.mark.parametrize(
    "job",
    [FULL, OP, pytest.param(COMPILED, marks=slow), pytest.param(NOTHING, marks=slow)],
    ids=["full", "op", "compiled", "none"],
)
def test_uneven_and_empty_experts(job: JobConfig) -> None:
    expected = check(replace(UNEVEN, job=job))
    for layer in range(2):
        for matrix in ("w1", "w2", "w3"):
            gradient = expected[f"0.layers.{layer}.moe.experts.{matrix}"]
            assert gradient[:2].norm() == 0
            assert gradient[2:].norm() > 0
        bias = expected[f"1.layers.{layer}.moe.expert_bias"]
        torch.testing.assert_close(bias[:2], torch.full((2,), 2 * 0.01 - 10.0))  # moved once a step, recomputed or not


@slow
@pytest.mark.parametrize(
    ("variant", "job"), [("deepseek", COMPILED), ("gpt-oss", COMPILED), ("two weighted inputs", FULL)]
)
def test_every_kind_of_experts_recomputed_and_compiled(variant: str, job: JobConfig) -> None:
    args = replace(ARGS, experts=VARIANTS[variant])
    check(replace(UNEVEN, args=args, degrees=Degrees(tp=2, ep=2), job=job, gate=1.0))


@pytest.mark.parametrize("degrees", [Degrees(tp=2, etp=2), Degrees(tp=2, ep=2)], ids=["etp 2", "ep 2"])
def test_uneven_experts_under_tensor_parallelism(degrees: Degrees) -> None:
    check(replace(UNEVEN, degrees=degrees, closed=(1, 3), job=FULL))


@pytest.mark.parametrize(
    ("degrees", "count"), [(Degrees(dp_shard=4, ep=2), 6), pytest.param(Degrees(dp_shard=6, ep=2), 4, marks=slow)]
)
def test_odd_sizes(degrees: Degrees, count: int) -> None:
    """Three experts on a rank, shared by two along another dimension; two, shared by three, that nothing divides; and
    biases with one dimension less to choose from. And experts one by one, for want of a kernel that takes seven
    columns."""
    odd = replace(ARGS, experts=replace(EXPERTS, count=count, hidden=7, bias=True))
    check(Case(degrees, args=odd, microbatch=2, job=NOTHING, steps=2))


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(RankError, match=r"layers.0.moe.experts.w1: 4 .* cannot be dealt evenly to the 3 ranks of ep"):
        run_ranks(3, step, Case(Degrees(dp_shard=3, ep=3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pipelines_are_cut_by_what_a_token_meets(variant: str) -> None:
    """Of experts those that it goes to, the shared one whole, of biases none."""
    args = replace(ARGS, experts=VARIANTS[variant])
    with torch.device("meta"):
        model = Decoder(args)
    plan = decoder_plan(args)
    costs = _costs(model, plan, Modules.expand(plan.order, args.n_layers))
    block = args.block(0)
    matrices = block.attention.matrices(args.dim) + block.feed_forward.matrices(args.dim)
    assert costs["layers.0"] == pytest.approx((2 * matrices, block.parameters(args.dim)))


def held(degrees: Degrees) -> dict[str, tuple[int, ...]]:
    """The shape of this rank's piece of each parameter of experts in the first layer."""
    dims = ParallelDims.build(degrees, "cpu")
    args = replace(ARGS, experts=replace(EXPERTS, bias=True))
    model = build_stages(load(), args, NOTHING, dims, torch.device("cpu"), torch.float32, seed=3)[0].module
    named = model.get_submodule("layers.0.moe.experts").named_parameters()
    return {name: tuple(p.to_local().shape) for name, p in named if isinstance(p, DTensor)}


def gathered_ahead(degrees: Degrees) -> list[list[str]]:
    """What the first block asks for ahead of its forward, the last of its backward; torch has no public name for it."""
    dims = ParallelDims.build(degrees, "cpu")
    model = build_stages(load(), ARGS, NOTHING, dims, torch.device("cpu"), torch.float32, seed=3)[0].module
    names = {module._get_fsdp_state(): name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    first, last = (cast(FSDPModule, model.get_submodule(f"layers.{i}"))._get_fsdp_state() for i in (0, 1))
    found = (first._states_to_forward_prefetch, last._states_to_backward_prefetch)
    return [[names[state] for state in states] for states in found]


def test_a_block_asks_for_the_next_ones_parameters_and_experts() -> None:
    for found in run_ranks(2, gathered_ahead, Degrees(dp_shard=2, ep=2)):
        assert found == [["layers.1", "layers.1.moe.experts"], ["layers.0", "layers.0.moe.experts"]]


@pytest.mark.parametrize(
    ("degrees", "experts", "hidden", "dim"),
    [
        (Degrees(dp_shard=2), 2, 12, 16),
        (Degrees(tp=2), 2, 12, 16),
        (Degrees(dp_shard=4, ep=4), 1, 12, 16),
        (Degrees(dp_shard=2, tp=2, ep=2), 1, 12, 16),
        (Degrees(dp_shard=2, tp=2, ep=2, etp=2), 2, 6, 8),
    ],
)
def test_each_rank_holds_its_share(degrees: Degrees, experts: int, hidden: int, dim: int) -> None:
    """`dim` is that of the bias: matrices keep theirs."""
    w1, w2, b1, b2 = (experts, hidden, 16), (experts, 16, hidden), (experts, hidden), (experts, dim)
    for found in run_ranks(degrees.world, held, degrees):
        assert found == {"w1": w1, "w2": w2, "w3": w1, "b1": b1, "b2": b2, "b3": b1}


def test_a_bias_that_cannot_be_dealt_is_refused() -> None:
    args = replace(ARGS, dim=15, experts=replace(EXPERTS, bias=True))
    with pytest.raises(RankError, match=r"experts.b2: 15 .* cannot be dealt evenly to the 2 ranks of etp"):
        run_ranks(2, step, Case(Degrees(tp=2, etp=2), args))
