"""Context parallelism: ranks that share sequences compute what one rank computes, loss and every gradient."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.config.compute import ActivationCheckpoint, Compile
from components.config.parallelism import Parallelism
from components.mesh.batch import IGNORE, Batch
from components.mesh.collectives import Axis
from components.mesh.degrees import resolve_degrees
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.mesh.tiled_attention import Tile
from components.parallel.chunks import Deal
from components.parallel.compile import compile_blocks
from components.parallel.context import share_sequence, split_sequence
from components.parallel.recompute import recompute
from components.runtime.errors import MeshError
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan
from models.llama3.args import FLAVORS, Llama3Args
from tests.components.parallel.kinds import KINDS, of_kind
from tests.ranks import run_ranks

SEQ = 72  # chunks of 18 for 2 ranks, 12 for 3, 9 for 4
NONE, FULL = ActivationCheckpoint(mode="none"), ActivationCheckpoint(mode="full")
OP = ActivationCheckpoint(mode="selective", selective_ac_option="op")

Case = tuple[Any, Any, bool, int, str]
"""Method, balancer, whether attention stays within documents, key heads, kind of blocks."""

METHODS = ("allgather", "alltoall", "ulysses")
ARGS = replace(FLAVORS["debugmodel"], dim=48, n_layers=2, n_heads=12, n_kv_heads=12, ffn_hidden=20, vocab_size=37)


def args(kv_heads: int, kind: str = "") -> Llama3Args:
    plain = replace(ARGS, n_kv_heads=kv_heads)
    return of_kind(plain, kind) if kind else plain


def make(kv_heads: int, kind: str = "", dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(args(kv_heads, kind))
    for parameter in model.parameters():  # norms too, so that their gradients are not all alike
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def rows(documents: bool) -> Batch:
    """Documents of uneven lengths, labels that are missing more in one half than in the other."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ARGS.vocab_size, (3, SEQ + 1), generator=generator)
    starts = torch.rand(3, SEQ, generator=generator) < 0.1
    starts[:, 0] = True
    starts[0, 1:] = False  # a row of one document
    first = torch.where(starts, torch.arange(SEQ), 0).cummax(1).values if documents else 0
    labels = tokens[:, 1:].clone()
    labels[1, : SEQ // 2 + 3] = IGNORE
    labels[2, ::3] = IGNORE
    return Batch(tokens[:, :-1], labels, (torch.arange(SEQ) - first).expand(3, SEQ), starts.cumsum(1) - 1)


def run(model: Any, batch: Batch, documents: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank's part, as its share of the mean over all valid labels, and its gradients."""
    hidden = model(batch.tokens, batch.positions, batch.document_ids if documents else None)
    logits, labels = model.output(hidden).flatten(0, 1).float(), batch.labels.flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / (rows(True).labels != IGNORE).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shared(
    cases: list[Case],
    dtype: torch.dtype,
    checkpointing: ActivationCheckpoint,
    compiled: bool,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each case the loss and the gradients of a model whose sequences all ranks share."""
    group = dist.distributed_c10d._get_default_group()  # dist.group.WORLD may be None by its type
    found = []
    for method, balancer, documents, kv_heads, kind in cases:
        axis = Axis(group, dist.get_world_size(), dist.get_rank())
        config = Parallelism(context_parallel_rotate_method=method, context_parallel_load_balancer=balancer)
        model, plan = make(kv_heads, kind, dtype), decoder_plan(args(kv_heads, kind))
        share_sequence(model, plan, axis, config)
        recompute(model, plan, checkpointing)
        compile_blocks(model, plan, Compile(enable=compiled, backend="aot_eager"))
        loss, gradients = run(model, split_sequence(rows(documents), axis, config), documents)
        for value in (loss, *gradients.values()):
            dist.all_reduce(value)
        found.append((loss, gradients))
    return found


def compare(
    ranks: int,
    cases: list[Case],
    bound: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    checkpointing: ActivationCheckpoint = NONE,
    compiled: bool = False,
) -> None:
    alone = {(d, h, kind): run(make(h, kind, dtype), rows(d), d) for _, _, d, h, kind in cases}
    for got in run_ranks(ranks, shared, cases, dtype, checkpointing, compiled, timeout=120):
        for case, (loss, gradients) in zip(cases, got, strict=True):
            want_loss, want = alone[case[2:]]
            assert loss.item() == pytest.approx(want_loss.item(), rel=bound), case
            assert gradients.keys() == want.keys()
            norm = torch.stack([g.float().norm() for g in want.values()]).norm()
            for name, gradient in want.items():
                error = (gradients[name].float() - gradient.float()).norm()
                assert error <= bound * max(gradient.float().norm(), 1e-3 * norm), (case, name, error)


WAYS = [(m, b, d) for m in METHODS for b in ("headtail", None) for d in (True, False)]
ALL: list[Case] = [(*way, h, "") for way in WAYS for h in (12, 4)]
FEW: list[Case] = [
    ("allgather", "headtail", False, 4, ""),
    ("alltoall", "headtail", True, 4, ""),
    ("ulysses", None, True, 2, ""),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_every_gradient_are_those_of_one_rank(ranks: int) -> None:
    compare(ranks, ALL)


def test_four_ranks_and_fewer_key_heads_than_ranks() -> None:
    more: list[Case] = [("alltoall", None, False, 6, ""), ("ulysses", "headtail", False, 6, "")]
    compare(4, [*FEW, *more, ("ulysses", None, False, 3, "")])


@pytest.mark.parametrize("kind", KINDS)
def test_windows_chunks_sinks_and_scales(kind: str) -> None:
    compare(2, [(*way, 4, kind) for way in WAYS])


@pytest.mark.slow
def test_windows_chunks_sinks_and_scales_on_four_ranks() -> None:
    compare(4, [(m, b, b is None, 6, kind) for kind in KINDS for m in METHODS for b in ("headtail", None)])


def test_bf16_is_as_close_as_its_digits() -> None:
    compare(2, [*FEW, ("alltoall", "headtail", False, 4, "sinks")], bound=3e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize("checkpointing", [OP, FULL], ids=["op", "full"])
def test_recomputed(checkpointing: ActivationCheckpoint) -> None:
    more: list[Case] = [("alltoall", "headtail", False, 4, ""), ("ulysses", "headtail", True, 4, "sinks")]
    compare(2, [*FEW, *more], checkpointing=checkpointing)


@pytest.mark.parametrize("kind", ["", pytest.param("sinks", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method", ["alltoall", *(pytest.param(m, marks=pytest.mark.slow) for m in ("allgather", "ulysses"))]
)
def test_compiled_without_graph_breaks(method: str, kind: str) -> None:
    compare(2, [(method, "headtail", method == "ulysses", 4, kind)], compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [OP, FULL], ids=["op", "full"])
def test_compiled_and_recomputed(checkpointing: ActivationCheckpoint) -> None:
    compare(2, [*FEW, ("alltoall", "headtail", False, 4, "sinks")], compiled=True, checkpointing=checkpointing)


def deal(rank: int, size: int, headtail: bool) -> Deal:
    return Deal(Axis(None, size, rank), headtail)  # pyrefly: ignore[bad-argument-type]  # nothing communicates here


def test_who_holds_what() -> None:
    x = torch.arange(12)
    assert [deal(r, 3, True).cut(x, 0).tolist() for r in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert [deal(r, 3, False).cut(x, 0).tolist() for r in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for headtail in (True, False):
        in_rank_order = torch.cat([deal(r, 3, headtail).cut(x, 0) for r in range(3)])
        assert torch.equal(deal(0, 3, headtail).to_row_order(in_rank_order, 0), x)
        assert torch.equal(deal(0, 3, headtail).to_rank_order(x, 0), in_rank_order)
        assert torch.equal(deal(2, 3, headtail).indices(4, x.device), deal(2, 3, headtail).cut(x, 0))


@pytest.mark.parametrize("headtail", [True, False])
def test_tiles_cover_what_causality_allows_and_no_more(headtail: bool) -> None:
    """Of n·n tiles of chunks n·(n + 1)/2 are computed; under headtail each rank has as many as the others."""
    size, length = 4, 6
    counts = []
    for rank in range(size):
        mine = deal(rank, size, headtail)
        index = mine.indices(length, torch.device("cpu"))
        want = index[:, None] >= torch.arange(size * length)
        for tiles in (mine.whole(length), tuple(tile for step in mine.steps(length) for tile in step)):
            assert torch.equal(covered(tiles, length, size), want)
        counts.append(sum(map(len, mine.steps(length))))
    assert counts == ([9] * 4 if headtail else [1, 2, 3, 4])


def covered(tiles: tuple[Tile, ...], length: int, size: int) -> Tensor:
    """Which keys the queries see. # (length, length · size)"""
    seen = torch.zeros(length, length * size, dtype=torch.bool)
    for tile in tiles:
        part = torch.ones(tile.queries, tile.keys, dtype=torch.bool)
        seen[tile.query : tile.query + tile.queries, tile.column : tile.column + tile.keys] |= (
            part.tril() if tile.causal else part
        )
    return seen


def test_heads_that_ranks_do_not_divide_are_refused() -> None:
    model = make(4)
    axis = Axis(None, 5, 0)  # pyrefly: ignore[bad-argument-type]  # it is refused before it communicates
    share_sequence(model, decoder_plan(ARGS), axis, Parallelism(context_parallel_rotate_method="ulysses"))
    with pytest.raises(MeshError) as error:
        run(model, rows(documents=False), documents=False)
    assert str(error.value) == (
        "parallelism.context_parallel_degree = 5: must divide the 12 heads of a rank with"
        ' context_parallel_rotate_method = "ulysses"; take a divisor, or "allgather"'
    )


def test_a_plan_without_attention_is_refused() -> None:
    axis = Axis(None, 2, 0)  # pyrefly: ignore[bad-argument-type]  # it is refused before it communicates
    with pytest.raises(MeshError) as error:
        share_sequence(make(4), Plan(blocks=(), embedding="", head=""), axis, Parallelism())
    assert str(error.value) == (
        "parallelism.context_parallel_degree = 2: Decoder has no plan for context parallelism: set it to 1"
    )


class Counting(TorchDispatchMode):
    """Counts what is communicated."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        self.found[name] += space == "_c10d_functional" and name != "wait_tensor"
        return func(*args, **(kwargs or {}))


def parts(rank: int, config: Parallelism) -> tuple[list[int], dict[str, int], dict[str, int]]:
    """On one of three ranks: which tokens of a row of 6 it has; what a block's attention sends, forward, backward."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
    axis = ParallelDims.build(resolve_degrees(config, 3), "cpu").axis("cp")
    x = torch.arange(6)[None]
    tokens = split_sequence(Batch(x, x, x, x), axis, config).tokens
    model = Decoder(replace(ARGS, n_layers=1))
    share_sequence(model, decoder_plan(ARGS), axis, config)
    with Counting() as forward:
        loss = model(tokens, tokens).sum()
    with Counting() as backward:
        loss.backward()
    return tokens[0].tolist(), +forward.found, +backward.found


@pytest.mark.shows(
    "parallelism.context_parallel_degree",
    "parallelism.context_parallel_load_balancer",
    "parallelism.context_parallel_rotate_method",
)
def test_what_each_rank_holds_and_sends() -> None:
    def of(rank: int, **settings: Any) -> tuple[list[int], dict[str, int], dict[str, int]]:
        config = Parallelism(**{f"context_parallel_{name}": value for name, value in settings.items()})
        return run_ranks(1, parts, rank, config, backend=None)[0]

    assert of(2) == ([0, 1, 2, 3, 4, 5], {}, {})
    gathers = {"all_gather_into_tensor": 2}, {"reduce_scatter_tensor": 2}
    assert of(1, degree=3) == ([1, 4], *gathers)
    assert of(1, degree=3, load_balancer="") == of(1, degree=3, load_balancer=None) == ([2, 3], *gathers)
    ring = {"all_to_all_single": 2}, {"all_to_all_single": 2 + 3}  # keys, then also the gradients, all the way round
    assert of(2, degree=3, rotate_method="alltoall") == ([2, 3], *ring)
    trade = {"all_to_all_single": 4}, {"all_to_all_single": 4}
    assert of(0, degree=3, rotate_method="ulysses") == ([0, 5], *trade)


def in_one_process(config: Parallelism, documents: bool, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """As `shared`, with all ranks in this process: each tensor is then one tensor for each rank."""
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode  # no public name yet
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    model, batch = make(4, kind), rows(documents)  # outside of the mode, in which each rank would draw its own numbers
    whole = (rows(True).labels != IGNORE).sum()
    with LocalTensorMode(3):
        axis = ParallelDims.build(resolve_degrees(config, 3), "cpu").axis("cp")
        share_sequence(model, decoder_plan(args(4, kind)), axis, config)
        batch = split_sequence(batch, axis, config)
        hidden = model(batch.tokens, batch.positions, batch.document_ids if documents else None)
        logits, labels = model.output(hidden).flatten(0, 1), batch.labels.flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / whole
        loss.backward()
        found = {"loss": loss.detach().clone()} | {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        for value in found.values():
            dist.all_reduce(value)
        summed = {name: value.reconcile() for name, value in found.items() if isinstance(value, LocalTensor)}
    return summed.pop("loss"), summed


@pytest.mark.parametrize(
    ("method", "documents", "kind"),
    [
        ("allgather", True, ""),
        ("alltoall", False, ""),
        ("ulysses", True, ""),
        ("allgather", True, "reach"),
        ("alltoall", False, "sinks"),
        ("ulysses", False, "sinks"),
    ],
)
def test_all_ranks_in_one_process(method: str, documents: bool, kind: str) -> None:
    config = Parallelism(context_parallel_degree=3, context_parallel_rotate_method=method)  # pyrefly: ignore[bad-argument-type]  # parametrized
    loss, gradients = run_ranks(1, in_one_process, config, documents, kind, backend=None)[0]
    want_loss, want = run(make(4, kind), rows(documents), documents)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert gradients.keys() == want.keys()
    for name, gradient in want.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
