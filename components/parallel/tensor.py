"""Tensor and sequence parallelism: ranks share each matrix, and between blocks each sequence.

Every parameter becomes a DTensor over `tp`, cut by DTensor's own rule, so that sizes that do not divide leave shorter
pieces and a global shape never depends on the layout. Modules get a new `forward` that computes with the local
piece and communicates through `components.mesh.collectives`; between blocks hidden states are (rows, seq / tp, dim).
Embedding and head are cut by vocabulary.

Nothing in here branches on the rank: under `comm.mode = "local_tensor"` it is symbolic. What differs between ranks are
sizes, which come from the local tensors.

Rejected: `parallelize_module` and its styles, whose activations are DTensors (docs/decisions/050), which cut heads in
two, and which need sizes that divide. Modules that hold all-gathers of their own (one for each of q, k, v) were
rejected too: one gather serves all columns of a `Gathered` module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from components.config.job_config import JobConfig
from components.mesh.collectives import Axis, gather, join, reduce_scatter, sizes_of, sum_gradient
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns, Gathered, Plan, Replicated, Rows
from components.mesh.projection import Projection, VocabularyShard
from components.parallel.local import local
from components.parallel.modules import find
from components.runtime.errors import ConfigError, MeshError

Placement = Replicate | Shard


def tensor(model: nn.Module, plan: Plan, dims: ParallelDims, job: JobConfig) -> None:
    """Cut every parameter over `tp` as the plan's `tensor` styles say, in place; without such ranks a no-op.

    Modules that the model (or this pipeline stage of it) lacks are skipped, parameters of experts are left alone.

    Args:
        model: The whole model or a stage, with whole parameters on any device, meta included.
        plan: The model's structure.
        dims: The mesh.
        job: For `parallelism.disable_loss_parallel` and `parallelism.enable_async_tensor_parallel`.

    Raises:
        MeshError: The model has no plan, a parameter that no style covers, or sizes that cannot be cut.
        ConfigError: Asynchronous tensor parallelism on a device that cannot do it.
    """
    if dims.degrees.tp > 1 and not plan.tensor:
        raise MeshError(
            f"parallelism.tensor_parallel_degree = {dims.degrees.tp}: this model family has no plan for tensor"
            " parallelism: set it to 1"
        )
    mesh, axis = dims.mesh("tp"), dims.axis("tp")
    if mesh is None or axis is None:
        return
    if job.parallelism.enable_async_tensor_parallel:
        overlap(mesh)
    cutter = _Cutter(mesh, axis)
    for pattern, style in plan.tensor.items():
        for name, module in _present(model, pattern):
            cutter.apply(name, module, style)
    for name, module in _present(model, plan.embedding):
        cutter.embedding(name, module)
    for name, module in _present(model, plan.head):
        cutter.head(name, module, gathered=job.parallelism.disable_loss_parallel)
    cutter.tie_again(model)
    _require_all_cut(model, plan)


def overlap(mesh: DeviceMesh) -> None:
    """Let inductor cut matmuls and the collectives beside them into pieces that overlap (micro-pipelining).

    It recognises the functional operators of `collectives` in the compiled blocks, and uses symmetric memory between
    the ranks of `mesh`. That needs CUDA and several of its devices, which the tests do not have: it has not been run.
    """
    if mesh.device_type != "cuda":
        raise ConfigError(
            "parallelism.enable_async_tensor_parallel = true: overlaps through CUDA's symmetric memory, but the device"
            f" is {mesh.device_type}; set it to false"
        )
    # Neither switch has a public name yet; torch documents both for exactly this use.
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def bound(fn: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`functools.partial` as a closure: the compiler, which tells partials apart by their identity, then lets equal
    blocks share one artifact."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fn(*first, *args, **kwargs)

    return forward


def _present(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of that name that are in this stage: others are missing, or `nn.Identity`."""
    for name, module in find(model, (pattern,)).items():
        if not isinstance(module, nn.Identity):
            yield name, module


def _require_all_cut(model: nn.Module, plan: Plan) -> None:
    experts = tuple(f"{name}." for name in find(model, plan.experts))
    whole = [
        name
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, DTensor) and not name.startswith(experts)
    ]
    if whole:
        raise MeshError(f"the plan's `tensor` says nothing of {', '.join(whole)}: give the module a style")


@dataclass(frozen=True)
class _Span:
    """What a rank computes of a dimension that ranks share."""

    start: int
    """Its first element."""
    size: int
    """Its number of elements, where the parameter is `shared`; else the local tensor's length says it."""
    shared: bool
    """Each rank holds the whole parameter and takes its span; else it holds nothing but the span."""

    @classmethod
    def of(cls, total: int, axis: Axis) -> "_Span":
        """An even cut, the last piece shorter. Where a rank would have nothing, all hold the whole, which is small:
        FSDP2 cannot reduce a gradient without elements."""
        sizes = sizes_of(total, axis.size)
        start = axis.rank * sizes[0]
        if sizes[-1]:
            return cls(start, sizes[0], shared=False)
        start = _least(start, total)
        return cls(start, _least(sizes[0], total - start), shared=True)

    def take(self, module: nn.Module, leaf: str, dim: int, axis: Axis) -> Any:
        """This rank's part of a module's parameter along `dim`; None if it has no such parameter."""
        found = local(module, leaf)
        if found is None or not self.shared:
            return found
        return sum_gradient(found, axis).narrow(dim, self.start, self.size)


def _least(a: int, b: int) -> int:
    return cast(int, torch.sym_min(a, b))  # typed as a float, but of integers an integer, symbolic ones included


class _Cutter:
    """Applies styles to modules. It remembers which parameter became which, so that tied ones stay one."""

    def __init__(self, mesh: DeviceMesh, axis: Axis) -> None:
        self.mesh, self.axis = mesh, axis
        self.cut: dict[nn.Parameter, nn.Parameter] = {}

    def apply(self, name: str, module: nn.Module, style: object) -> None:
        """One module, one style."""
        if isinstance(style, Gathered):
            module.forward = bound(_gathered, module.forward, self.axis)
        elif isinstance(style, Columns):
            self.columns(name, module, style.unit)
        elif isinstance(style, Rows):
            self.rows(name, module, style.unit)
        elif isinstance(style, Replicated):
            for part in module.modules():
                self.replicated(part)

    def columns(self, name: str, module: nn.Module, unit: int) -> None:
        """Output features over ranks; units fewer than ranks: the weight whole, of which each rank computes one."""
        features = _linear(name, module).weight.shape[0]
        ranks, units = self.axis.size, features // unit
        if unit > 1 and units % ranks and ranks % units:
            raise MeshError(
                f"parallelism.tensor_parallel_degree = {ranks}: {name} has {features} output features in units of"
                f" {unit}, and {units} neither is a multiple of {ranks} nor divides it"
            )
        span = _Span.of(features, self.axis)
        if unit > 1 and units < ranks:
            span = _Span(self.axis.rank // (ranks // units) * unit, unit, shared=True)
        for leaf in ("weight", "bias"):
            self.place(module, leaf, Replicate() if span.shared else Shard(0))
        module.forward = bound(_columns, module, self.axis, span)

    def rows(self, name: str, module: nn.Module, unit: int) -> None:
        """Input features over ranks; the bias, which is added once, by each rank to its tokens."""
        features = _linear(name, module).weight.shape[1]
        if unit > 1 and features // unit % self.axis.size:
            raise MeshError(
                f"parallelism.tensor_parallel_degree = {self.axis.size}: {name} has {features} input features in units"
                f" of {unit}, and {features // unit} is no multiple of {self.axis.size}"
            )
        span = _Span.of(features, self.axis)
        self.place(module, "weight", Replicate() if span.shared else Shard(1))
        self.place(module, "bias", Replicate())
        module.forward = bound(_rows, module, self.axis, span)

    def replicated(self, module: nn.Module) -> None:
        """Parameters whole on each rank; `forward` finds them as local tensors whose gradients are summed."""
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            self.place(module, name, Replicate())
        if names:
            module.forward = bound(type(module).forward, _Local(module, self.axis))

    def embedding(self, name: str, module: nn.Module) -> None:
        """By vocabulary; the output is cut along the sequence."""
        if not isinstance(module, nn.Embedding):
            raise MeshError(f"the embedding {name} is a {type(module).__name__}: only nn.Embedding can be cut")
        span = _Span.of(module.num_embeddings, self.axis)
        self.place(module, "weight", Replicate() if span.shared else Shard(0))
        module.forward = bound(_embedding, module, self.axis, span)

    def head(self, name: str, module: nn.Module, gathered: bool) -> None:
        """By vocabulary; hidden states come in cut along the sequence."""
        vocab_size = _linear(name, module).weight.shape[0]
        span = _Span.of(vocab_size, self.axis)
        for leaf in ("weight", "bias"):
            self.place(module, leaf, Replicate() if span.shared else Shard(0))
        module.forward = bound(_head, module, self.axis, span, vocab_size, gathered)

    def place(self, module: nn.Module, leaf: str, placement: Placement) -> None:
        """Make a module's own parameter a DTensor, if it has it."""
        old = getattr(module, leaf, None)
        if old is None or isinstance(old, DTensor):
            return
        if old not in self.cut:
            new = distribute_tensor(old.detach(), self.mesh, [placement], src_data_rank=None)
            self.cut[old] = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, leaf, self.cut[old])

    def tie_again(self, model: nn.Module) -> None:
        """A later pipeline stage keeps a tied parameter's first name in the `nn.Identity` in place of its module."""
        for module in model.modules():
            if isinstance(module, nn.Identity):
                for leaf, old in list(module.named_parameters()):
                    setattr(module, leaf, self.cut.get(old, old))


def _linear(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise MeshError(f"the plan cuts {name} like a linear layer, but it is a {type(module).__name__}")
    return module


class _Local:
    """A module as its `forward` sees it under `Replicated`: its own parameters are local tensors, all else is its own.

    Swapping the parameters of the module itself was rejected: compiled code would have to prove that they come back.
    """

    def __init__(self, module: nn.Module, axis: Axis) -> None:
        self.module, self.axis = module, axis

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return sum_gradient(local(self.module, name), self.axis) if isinstance(value, DTensor) else value


def _gathered(forward: Callable[..., Any], axis: Axis, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return forward(gather(x, 1, axis), *args, **kwargs)


def _columns(module: nn.Module, axis: Axis, span: _Span, x: Tensor) -> Tensor:
    return F.linear(x, span.take(module, "weight", 0, axis), span.take(module, "bias", 0, axis))


def _rows(module: nn.Module, axis: Axis, span: _Span, x: Tensor) -> Tensor:
    out = reduce_scatter(F.linear(x, span.take(module, "weight", 1, axis)), 1, axis)
    bias = local(module, "bias")
    return out if bias is None else out + sum_gradient(bias, axis)


def _embedding(module: nn.Module, axis: Axis, span: _Span, tokens: Tensor) -> Tensor:
    """Each rank looks up the tokens of its vocabulary; the others are 0 there. # (rows, seq) → (rows, seq / tp, dim)"""
    weight = span.take(module, "weight", 0, axis)
    index = tokens - span.start
    inside = (index >= 0) & (index - weight.shape[0] < 0)  # symbolic sizes subtract, but do not compare with tensors
    if span.shared:  # some ranks have no entry to point other ranks' tokens at
        weight = F.pad(weight, (0, 0, 0, 1))
    out = F.embedding(torch.where(inside, index, 0), weight)
    return reduce_scatter(out.masked_fill(~inside[..., None], 0.0), 1, axis)


def _head(
    module: nn.Module,
    axis: Axis,
    span: _Span,
    vocab_size: int,
    gathered: bool,
    input: Tensor,
    apply: Callable[[Tensor, Projection], Any] | None = None,
) -> Any:
    """The contract of `components.layers.head.Head`, for hidden states (rows, seq / tp, dim)."""
    weight, bias = span.take(module, "weight", 0, axis), span.take(module, "bias", 0, axis)
    shard = VocabularyShard(axis, vocab_size, weight.shape[0])

    def mine(hidden: Tensor) -> Tensor:
        return F.linear(hidden, weight, bias)

    def all_of_them(hidden: Tensor) -> Tensor:
        return join(mine(hidden), -1, axis, shard.sizes)

    project = Projection(all_of_them) if gathered else Projection(mine, shard)
    hidden = gather(input, 1, axis)
    return project(hidden) if apply is None else apply(hidden, project)
