"""Pipeline parallelism: the model cut into stages, of which a rank holds one or more.

A stage is a model of the same class in which modules that other stages hold are `nn.Identity`, and blocks that others
hold are missing from their container, where those that are left keep their numbers. So parameters keep the names of
the whole model, and the model's forward knows nothing of pipelines. A wrapper with a forward of its own was rejected:
every model would have to be written twice.

Parameters that are tied across stages become one in each. The later stage finds its one under the first of the tied
names too, so that both are initialized, optimized and saved by the same name (see `pipeline_tied`).
"""

import copy
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Plan
from components.parallel.modules import find
from components.parallel.pipeline_cut import Cost, Modules, cut_modules
from components.runtime.errors import MeshError


@dataclass(frozen=True)
class Tie:
    """A parameter that two stages hold."""

    name: str
    """Its name in both."""
    stages: tuple[int, int]
    """The stage that uses it first, and the one that uses it last."""


@dataclass(frozen=True)
class Stage:
    """A piece of the model that one rank runs as a whole."""

    index: int
    """Place among all stages of the model, from 0."""
    count: int
    """Number of stages."""
    module: nn.Module
    """The model, without what other stages hold."""
    ranks: tuple[int, ...] = (0,)
    """The pipeline rank that runs each of the stages."""
    width: int = 0
    """Features of the hidden states that go from stage to stage."""
    ties: tuple[Tie, ...] = ()
    """All parameters of the model that two stages hold."""

    @property
    def first(self) -> bool:
        """Whether it takes token ids."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the head, and so the loss."""
        return self.index == self.count - 1


def split(model: nn.Module, plan: Plan, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This pipeline rank's stages of a whole model on the meta device, which is used up.

    Raises MeshError for a plan without an order, ConfigError for keys that do not fit the model.
    """
    modules = _modules(model, plan, job)
    cut = cut_modules(job.parallelism, modules, _costs(model, plan, modules))
    stage_of = {name: stage for stage, part in enumerate(cut.parts) for name in part}
    ties = tuple(_ties(model, plan, stage_of))
    axis = dims.axis("pp")
    mine = [stage for stage, rank in enumerate(cut.ranks) if axis is None or rank == axis.rank]
    width = next(model.get_submodule(plan.embedding).parameters()).shape[-1]
    return [
        Stage(stage, len(cut.parts), _prune(model, plan, modules, cut.parts[stage]), cut.ranks, width, ties)
        for stage in mine
    ]


def _modules(model: nn.Module, plan: Plan, job: JobConfig) -> Modules:
    if not plan.order:
        raise MeshError(
            f"parallelism.pipeline_parallel_degree = {job.parallelism.pipeline_parallel_degree}: this model family has"
            " no plan for pipeline parallelism: set it to 1"
        )
    layers = len(find(model, tuple(name for name in plan.order if "*" in name)))
    return Modules.expand(plan.order, layers)


class Layer(Protocol):
    """What is asked of the mixture-of-experts layers that the plan names."""

    experts: nn.Module
    """Their parameters are stacked, by expert."""
    n_experts: int
    k: int
    """Experts of each token."""


def _costs(model: nn.Module, plan: Plan, modules: Modules) -> dict[str, Cost]:
    """FLOPs by the elements of matrices that a token meets, two to a multiplication and addition; looking up an
    embedding costs none, nor do biases, of which experts' are stacked too."""
    layers = [cast(Layer, module) for module in find(model, plan.experts).values()]
    met = {id(p): layer.k / layer.n_experts * (p.ndim > 2) for layer in layers for p in layer.experts.parameters()}
    costs: dict[str, Cost] = {}
    for name in modules.names:
        beside = [other for other in plan.beside.get(name, ()) if other not in modules.names]
        parameters = [p for part in (name, *beside) for p in model.get_submodule(part).parameters()]
        flops = 2 * sum(p.numel() * met.get(id(p), 1.0) for p in parameters if p.ndim > 1)
        costs[name] = (0.0 if name == plan.embedding else flops, sum(p.numel() for p in parameters))
    return costs


def _ties(model: nn.Module, plan: Plan, stage_of: dict[str, int]) -> list[Tie]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = [(a, b) for a, b in plan.tied if a in parameters and parameters[a] is parameters.get(b)]
    found = [Tie(a, (stage_of[_owner(a)], stage_of[_owner(b)])) for a, b in tied]
    again = [(other, name) for name, others in plan.beside.items() for other in others if other in stage_of]
    for other, name in again:
        leaves = (leaf for leaf, _ in model.get_submodule(other).named_parameters())
        found += [Tie(f"{other}.{leaf}", (stage_of[other], stage_of[name])) for leaf in leaves]
    return [tie for tie in dict.fromkeys(found) if tie.stages[0] != tie.stages[1]]


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _prune(model: nn.Module, plan: Plan, modules: Modules, part: tuple[str, ...]) -> nn.Module:
    """A copy of the model with the modules of one part alone; copies on the meta device take no memory."""
    held = {*part, *(other for name in part for other in plan.beside.get(name, ()))}
    known = dict.fromkeys((*modules.names, *(other for others in plan.beside.values() for other in others)))
    absent = [name for name in known if name not in held]
    replaced: dict[int, object] = {id(model.get_submodule(name)): nn.Identity() for name in absent}
    tied = [(a, b) for a, b in plan.tied if _owner(a) in absent and _owner(b) in part and _same(model, a, b)]
    stage = copy.deepcopy(model, replaced)
    for name in absent:
        if name in modules.layers:
            container, _, key = name.rpartition(".")
            delattr(stage.get_submodule(container), key)
    for a, b in tied:
        stage.get_submodule(_owner(a)).register_parameter(a.rpartition(".")[2], stage.get_parameter(b))
    return stage


def _same(model: nn.Module, a: str, b: str) -> bool:
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return a in parameters and parameters[a] is parameters.get(b)
