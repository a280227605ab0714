"""Tensor and sequence parallelism: ranks share each matrix, and between blocks each sequence.

Every parameter becomes a DTensor over `tp`, cut by DTensor's own rule, so that sizes that do not divide leave shorter
pieces and a global shape never depends on the layout. Modules get a new `forward` (`components.parallel.shares`) that
computes with the local piece and communicates through `components.mesh.collectives`; between blocks hidden states are
(rows, seq / tp, dim). Embedding and head are cut by vocabulary.

Rejected: `parallelize_module` and its styles, whose activations are DTensors (docs/decisions/050), which cut heads in
two, and which need sizes that divide. Modules that hold all-gathers of their own (one for each of q, k, v) were
rejected too: one gather serves all columns of a `Gathered` module.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from components.config.job_config import JobConfig
from components.mesh.collectives import Axis
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns, Dealt, Gathered, Plan, Replicated, Rows
from components.parallel import shares
from components.parallel.modules import find
from components.parallel.shares import Local, Span, bound
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
    dealt = [pattern.rpartition(".") for pattern, style in plan.tensor.items() if isinstance(style, Dealt)]
    for pattern, _, leaf in dealt:  # first, since it changes what a module's own forward sees
        for _, module in _present(model, pattern):
            cutter.dealt(module, leaf)
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
    from torch.distributed import _symmetric_memory

    # Neither has a public name. The second is deprecated, but up to torch 2.13 the first passes over groups without it.
    torch._inductor.config._micro_pipeline_tp = True
    if enable := getattr(_symmetric_memory, "enable_symm_mem_for_group", None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            enable(mesh.get_group().group_name)


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


class _Cutter:
    """Applies styles to modules. It remembers which parameter became which, so that tied ones stay one."""

    def __init__(self, mesh: DeviceMesh, axis: Axis) -> None:
        self.mesh, self.axis = mesh, axis
        self.cut: dict[nn.Parameter, nn.Parameter] = {}

    def apply(self, name: str, module: nn.Module, style: object) -> None:
        """One module, one style."""
        if isinstance(style, Gathered):
            module.forward = bound(shares.gathered, module.forward, self.axis)
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
        span = Span.of(features, self.axis)
        if unit > 1 and units < ranks:
            span = Span(self.axis.rank // (ranks // units) * unit, unit, shared=True)
        for leaf in ("weight", "bias"):
            self.place(module, leaf, Replicate() if span.shared else Shard(0))
        module.forward = bound(shares.columns, module, self.axis, span)

    def rows(self, name: str, module: nn.Module, unit: int) -> None:
        """Input features over ranks; the bias, which is added once, by each rank to its tokens."""
        features = _linear(name, module).weight.shape[1]
        if unit > 1 and features // unit % self.axis.size:
            raise MeshError(
                f"parallelism.tensor_parallel_degree = {self.axis.size}: {name} has {features} input features in units"
                f" of {unit}, and {features // unit} is no multiple of {self.axis.size}"
            )
        span = Span.of(features, self.axis)
        self.place(module, "weight", Replicate() if span.shared else Shard(1))
        self.place(module, "bias", Replicate())
        module.forward = bound(shares.rows, module, self.axis, span)

    def replicated(self, module: nn.Module) -> None:
        """Parameters whole on each rank; `forward` finds them as local tensors whose gradients are summed."""
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            self.place(module, name, Replicate())
        if names:
            module.forward = bound(type(module).forward, Local(module, self.axis))

    def dealt(self, module: nn.Module, leaf: str) -> None:
        """A parameter of the module's own, by its first dimension; `forward` finds it as a local tensor. Where heads do
        not divide, `rows` refuses."""
        if getattr(module, leaf, None) is not None:
            self.place(module, leaf, Shard(0))
            module.forward = bound(type(module).forward, Local(module, None))

    def embedding(self, name: str, module: nn.Module) -> None:
        """By vocabulary; the output is cut along the sequence."""
        if not isinstance(module, nn.Embedding):
            raise MeshError(f"the embedding {name} is a {type(module).__name__}: only nn.Embedding can be cut")
        span = Span.of(module.num_embeddings, self.axis)
        self.place(module, "weight", Replicate() if span.shared else Shard(0))
        module.forward = bound(shares.embedding, module, self.axis, span)

    def head(self, name: str, module: nn.Module, gathered: bool) -> None:
        """By vocabulary; hidden states come in cut along the sequence."""
        vocab_size = _linear(name, module).weight.shape[0]
        span = Span.of(vocab_size, self.axis)
        for leaf in ("weight", "bias"):
            self.place(module, leaf, Replicate() if span.shared else Shard(0))
        module.forward = bound(shares.head, module, self.axis, span, vocab_size, gathered)

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
