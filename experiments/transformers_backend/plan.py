"""How a model of transformers is laid out: its Plan, whose tensor-parallel styles come from the plan that the model
ships, or where it ships none from the usual names of modules.

Their plans say how each matrix is cut, but not what their heads are, which modules see whole sequences, nor what is
replicated; that is found in the modules. What has no counterpart here makes the whole refused: a part that is left
alone would compute with pieces where it expects all.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from components.config.job_config import JobConfig
from components.mesh.parallel_dims import ParallelDims
from components.mesh.plan import Columns, Gathered, Plan, Replicated, Rows, Style
from components.parallel.apply import parallelize
from components.parallel.modules import find
from components.parallel.pipeline import Stage, split
from components.runtime.errors import ConfigError
from experiments.transformers_backend.model import BentHead, Elsewhere, HFModel

USUAL = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    "out_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
    "fc1": "colwise",
    "fc2": "rowwise",
}
"""Names that mean the same in all models that have them."""
HEADS = frozenset({"q_proj", "k_proj", "v_proj"})
"""Linear layers whose outputs are heads."""


def hf_plan(model: HFModel, tensor: Mapping[str, Style]) -> Plan:
    """What a model is."""
    anatomy = model.args.anatomy
    return Plan(
        blocks=(f"{anatomy.container}.*",),
        embedding=anatomy.embedding,
        head="output",
        tied=((f"{anatomy.embedding}.weight", "output.weight"),),
        tensor=tensor,
        order=anatomy.order,
    )


def parallelize_hf(model: nn.Module, dims: ParallelDims, job: JobConfig, dtype: torch.dtype) -> nn.Module:
    """The model, or a pipeline stage of it, laid out over the mesh; `dtype` is the type of compute. Raises ConfigError
    for a model that tensor parallelism cannot cut."""
    ours, styles = cast(HFModel, model), dict[str, Style]()
    if dims.degrees.tp > 1:
        styles, reasons = tensor_styles(ours)
        if reasons:
            degree = f"parallelism.tensor_parallel_degree = {dims.degrees.tp}"
            raise ConfigError(*(f"{degree}: {reason}; set it to 1" for reason in reasons))
        for module in find(
            model, tuple(name for name, style in styles.items() if isinstance(style, Gathered))
        ).values():
            module.register_forward_pre_hook(_first_by_position(module), with_kwargs=True)
    done = parallelize(model, hf_plan(ours, styles), dims, job, dtype)
    if dims.degrees.tp > 1 and isinstance(ours.output, BentHead):
        ours.output.forward = _bent_again(ours.output, ours.output.forward)
    return done


def pipeline_hf(model: nn.Module, dims: ParallelDims, job: JobConfig) -> list[Stage]:
    """This rank's pipeline stages of a whole model on the meta device. Layers that other stages hold let hidden states
    pass, since their forward counts layers."""
    ours = cast(HFModel, model)
    anatomy = ours.args.anatomy
    if anatomy.uncut:
        degree = f"parallelism.pipeline_parallel_degree = {dims.degrees.pp}"
        raise ConfigError(f"{degree}: {anatomy.uncut}; set it to 1")
    stages = split(model, hf_plan(ours, {}), dims, job)
    parent, _, leaf = anatomy.container.rpartition(".")
    for stage in stages:
        there = dict(stage.module.get_submodule(anatomy.container).named_children())
        layers = nn.ModuleList(there.get(str(i), Elsewhere()) for i in range(len(anatomy.layers)))
        setattr(stage.module.get_submodule(parent), leaf, layers)
    return stages


def tensor_styles(model: HFModel) -> tuple[dict[str, Style], list[str]]:
    """The style of each module that holds parameters, by pattern, and why the model cannot be cut; one of them empty.

    The model may be a stage: what it lacks is not spoken of.
    """
    anatomy = model.args.anatomy
    styles, reasons = dict[str, Style](), list[str]()
    if anatomy.uncut:
        reasons.append(anatomy.uncut)
    if why := _embedding_problem(model.get_submodule(anatomy.embedding)):
        reasons.append(f"{anatomy.embedding} {why}")
    shipped = _shipped(model)
    for name, layer in find(model, (f"{anatomy.container}.*",)).items():
        found = _Layer(name, layer, shipped or _derived(name, layer))
        styles |= {_pattern(name, anatomy.container): style for name, style in found.styles.items()}
        reasons += [_pattern(reason, anatomy.container) for reason in found.reasons]
    inside = (anatomy.embedding, f"{anatomy.container}.", "output")
    for name, module in model.named_modules():
        if [*module.parameters(recurse=False)] and not name.startswith(inside):
            if _is_norm(module):
                styles[name] = Replicated()
            else:
                reasons.append(f"{name}: nothing says how {type(module).__name__} is cut")
    return styles, list(dict.fromkeys(reasons))


def _shipped(model: HFModel) -> dict[str, str]:
    """The plan that the model ships, by our names. Lists of plans begin with the head's, which is ours."""
    plan: Mapping[str, str] = getattr(model.model.config, "base_model_tp_plan", None) or {}
    return {f"model.{name}": kind for name, kind in plan.items()}


def _derived(name: str, layer: nn.Module) -> dict[str, str]:
    linears = [child for child, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return {f"{name}.{child}": USUAL[leaf] for child in linears if (leaf := child.rpartition(".")[2]) in USUAL}


def _pattern(name: str, container: str) -> str:
    """A name with `*` for the number of the layer."""
    return re.sub(rf"^{re.escape(container)}\.\d+", f"{container}.*", name)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has vectors only, and so scales and shifts single tokens or heads."""
    return all(p.ndim == 1 for p in module.parameters(recurse=False))


def _embedding_problem(embedding: nn.Module) -> str:
    """Why an embedding cannot be cut by vocabulary; empty if it can, or if another stage holds it."""
    if isinstance(embedding, nn.Identity):
        return ""
    if type(embedding).forward is not nn.Embedding.forward:
        return f"is a {type(embedding).__name__}, which does more than to look up"
    if cast(nn.Embedding, embedding).padding_idx is not None:
        return "has an entry that is not trained; set pad_token_id to null in config.json"
    return ""


class _Layer:
    """The styles of one decoder layer, and why it has none."""

    def __init__(self, name: str, layer: nn.Module, plan: Mapping[str, str]) -> None:
        self.styles: dict[str, Style] = {}
        self.reasons: list[str] = []
        self.plan = plan
        modules = dict(layer.named_modules(prefix=name))
        cut: dict[str, dict[str, nn.Linear]] = {}
        for child, module in modules.items():
            if isinstance(module, nn.Linear) and self.kind(child, module) in ("colwise", "rowwise"):
                cut.setdefault(child.rpartition(".")[0], {})[child] = module
        for parent, linears in cut.items():
            self.share(parent, modules[parent], linears)
        for child, module in modules.items():
            if [*module.parameters(recurse=False)] and not any(child in linears for linears in cut.values()):
                around = next((modules[parent] for parent in cut if child.startswith(f"{parent}.")), None)
                self.rest(child, module, around)

    def kind(self, name: str, module: nn.Module) -> str | None:
        """What the plan says of a module, or of one of its parameters."""
        names = [name, *(f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))]
        return next((kind for key, kind in self.plan.items() if any(_matches(key, n) for n in names)), None)

    def share(self, name: str, parent: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        """Linear layers of one module: some cut by columns, whose outputs one takes that is cut by rows."""
        columns = {child: m for child, m in linears.items() if self.kind(child, m) == "colwise"}
        rows = {child: m for child, m in linears.items() if child not in columns}
        leaves = {child.rpartition(".")[2] for child in columns}
        unit = getattr(parent, "head_dim", None) if leaves == HEADS else 1
        widths = {m.out_features for child, m in columns.items() if unit == 1 or child.endswith(".q_proj")}
        if len(rows) != 1 or unit is None or widths != {m.in_features for m in rows.values()}:
            told = ", ".join(
                f"{child.rpartition('.')[2]} ({m.in_features} to {m.out_features})" for child, m in linears.items()
            )
            self.reasons.append(
                f"{name}: the features of {told} cannot be dealt out, since several matrices are fused in one"
            )
            return
        self.styles[name] = Gathered()
        self.styles |= {child: Columns(unit=unit) for child in columns}
        self.styles |= {child: Rows(unit=unit) for child in rows}

    def rest(self, name: str, module: nn.Module, around: nn.Module | None) -> None:
        """Another module with parameters; `around`: the module with cut layers that it is in."""
        kind = self.kind(name, module)
        of_heads = around is None or all(len(p) == getattr(around, "head_dim", None) for p in module.parameters())
        if kind is not None and not kind.startswith("replicate"):
            self.reasons.append(f"{name}: {kind!r} of the model's plan has no counterpart here")
        elif not _is_norm(module):
            self.reasons.append(f"{name}: nothing says how {type(module).__name__} is cut")
        elif not of_heads:
            self.reasons.append(f"{name}: it needs all heads at once")
        else:
            self.styles[name] = Replicated()


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name) is not None


def _first_by_position(module: nn.Module) -> Callable[..., Any]:
    """Layers name all arguments of their modules; what gathers looks at the first."""
    first = next(iter(inspect.signature(module.forward).parameters))

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return None
        return (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}

    return hook


def _bent_again(head: BentHead, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that tensor parallelism has given the head, with what the model does to its logits."""

    def bent(input: torch.Tensor, apply: Callable[..., Any] | None = None) -> Any:
        return head.bent(forward, input, apply)

    return bent
