"""What a model of transformers is made of, found by letting it run once without values, and by looking on.

Every module's input and output is a tensor object: where one module's output is the very object that the next one
takes, nothing happens between the two, and there a pipeline can cut. Reading their code, or a list of known models, was
rejected: neither says what the installed version does.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree  # has no public name

from components.layers.shapes import Reach
from components.runtime.errors import ConfigError
from experiments.transformers_backend.args import HFArgs
from experiments.transformers_backend.attention import ROWS, Rows, attention, register
from experiments.transformers_backend.build import body_name, hf_model, refusal
from experiments.transformers_backend.first_values import record
from experiments.transformers_backend.model import HFModel, bend_of

LOOK = "espalier_look"
"""What attention is registered as while somebody looks on."""
_LENGTH = 8


@dataclass(frozen=True)
class Layer:
    """One decoder layer's attention."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    width: int
    """Multiplications of one query with one key, and of one weight with one value, over all heads."""
    reach: Reach
    """Which tokens it sees."""


@dataclass(frozen=True)
class Anatomy:
    """What is known of a model. Names are ours: `model.…` and `output`."""

    vocab_size: int
    """Rows of the embedding."""
    embedding: str
    """The embedding of tokens."""
    container: str
    """What holds the decoder layers."""
    norm: str | None
    """The final norm."""
    layers: tuple[Layer, ...]
    """The decoder layers, in order."""
    parameters: int
    """Number of parameters."""
    matrices: int
    """Elements of the matrices that a token is multiplied with."""
    longest: int | None
    """Positions that the model was made for; None: not said."""
    uncut: str
    """Why a pipeline cannot cut it between layers; empty if it can."""

    @property
    def order(self) -> tuple[str, ...]:
        """The modules in the order in which they run."""
        return tuple(name for name in (self.embedding, f"{self.container}.*", self.norm, "output") if name)


@dataclass
class _Seen:
    """What was seen in a forward pass."""

    makers: dict[int, str] = field(default_factory=dict)
    """Tensor, by identity → the module that gave it, the innermost one."""
    entered: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Module → its arguments."""
    left: dict[str, Tensor] = field(default_factory=dict)
    """Module → its output."""
    layers: list[Layer] = field(default_factory=list)
    """Calls of attention."""
    dropped: set[float] = field(default_factory=set)
    """Probabilities of dropout."""


@functools.lru_cache(maxsize=16)
def examine(args: HFArgs) -> Anatomy:
    """The anatomy of a model. Raises ConfigError for what transformers cannot build, or what cannot be trained here."""
    seen = _Seen()
    with torch.device("meta"):
        whole = hf_model(args, register(LOOK, _looking_on(seen)))
        model = HFModel.__new__(HFModel)
        nn.Module.__init__(model)
        _require_still(args, whole.config)
        if "position_ids" not in inspect.signature(whole.get_submodule(body_name(whole)).forward).parameters:
            raise refusal(args, f"{type(whole).__name__} takes no position_ids, which each packed document counts anew")
        first = record(whole)
        logits = _run(args, whole, seen, first.derived)
        model.take(args, whole, first)
    _require_trainable(args, whole, seen, logits)
    return _describe(args, model, body_name(whole), seen)


def _looking_on(seen: _Seen) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not getattr(module, "is_causal", True):
            raise ConfigError(f"{type(module).__name__} looks ahead")
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        heads, width = query.shape[1], query.shape[3] + value.shape[3]
        seen.layers.append(Layer(heads, key.shape[1], heads * width, Reach(window=window)))
        seen.dropped |= {kwargs.get("dropout", 0.0)}
        return attention(module, query, key, value, *args, **kwargs)

    return attend


class _Dropout(TorchFunctionMode):
    """Notes probabilities of dropout."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("training", True):
            self.seen.dropped.add(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        return func(*args, **kwargs)


def _run(args: HFArgs, whole: Any, seen: _Seen, derived: list[Any]) -> Tensor:
    """One forward pass of their model on the meta device; its logits."""
    hooks = []
    for name, module in whole.named_modules():
        hooks.append(module.register_forward_pre_hook(_entering(seen, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(_leaving(seen, name)))
    positions = torch.arange(_LENGTH)[None]
    setattr(whole.get_submodule(body_name(whole)).config, ROWS, Rows(positions, positions))
    whole.config._experts_implementation = "batched_mm"  # the one whose steps can be taken without values
    for each in derived:
        each.place(positions.device)
    try:
        with _Dropout(seen):
            out = whole(
                input_ids=torch.zeros_like(positions),
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            )
    except Exception as error:  # their code, which may do with values what it likes
        raise refusal(args, f"{type(whole).__name__} cannot run without values: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        delattr(whole.get_submodule(body_name(whole)).config, ROWS)
    return out.logits


def _entering(seen: _Seen, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.entered[name] = (args, kwargs)

    return hook


def _leaving(seen: _Seen, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output = getattr(output, "last_hidden_state", output)
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            seen.left[name] = first
            seen.makers.setdefault(id(first), name)

    return hook


def _require_trainable(args: HFArgs, whole: Any, seen: _Seen, logits: Tensor) -> None:
    config, count = whole.config, whole.config.num_hidden_layers
    if rates := sorted(rate for rate in seen.dropped if rate):
        drops = {key: rate for key, rate in config.to_dict().items() if "drop" in key and rate in rates}
        fields = [key for key in drops if not key.startswith(("summary_", "classifier_"))]
        raise refusal(
            args,
            f"dropout of {', '.join(map(str, rates))}: it would draw differently in every layout; set"
            f" {', '.join(fields) or 'it'} to 0 there",
        )
    if len(seen.layers) != count:
        raise refusal(
            args,
            f"{len(seen.layers)} of {count} layers ask transformers for attention: what mixes tokens in the others"
            " would run across documents",
        )
    head, body = _place(whole, whole.get_output_embeddings()), seen.left.get(body_name(whole))
    if bend_of(config) is None and seen.left[head] is not logits:
        raise refusal(args, f"{type(whole).__name__} does something to its logits that no known field says")
    if body is None or _root(seen.entered[head][0][0]) is not _root(body):
        raise refusal(args, f"{type(whole).__name__} does something between its body and its head")


def _require_still(args: HFArgs, config: Any) -> None:
    """Raise ConfigError for rotary frequencies that change with the rows."""
    said = getattr(config, "rope_parameters", None)
    tables = [said, *said.values()] if isinstance(said, dict) else []  # one, or one for each kind of layer
    kinds = {table.get("rope_type") for table in tables if isinstance(table, dict)}
    if moving := [kind for kind in ("dynamic", "longrope") if kind in kinds]:
        raise refusal(args, f"rope_type {moving[0]!r}: frequencies would depend on the longest row of each microbatch")


def _place(whole: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in whole.named_modules() if module is wanted)


def _root(tensor: Tensor) -> Tensor:
    """The tensor that it is a view of."""
    return tensor if tensor._base is None else tensor._base


def _describe(args: HFArgs, model: HFModel, body_prefix: str, seen: _Seen) -> Anatomy:
    body: Any = model.model
    config = body.config
    container = next(
        (
            name
            for name, module in body.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
        ),
        None,
    )
    if container is None:
        raise refusal(args, f"no list of {config.num_hidden_layers} layers is in {type(body).__name__}")
    embedding = model.embedding_name.removeprefix("model.")
    norm, uncut = _chain(body_prefix, seen, embedding, container, config.num_hidden_layers)
    return Anatomy(
        vocab_size=len(model.get_parameter(f"{model.embedding_name}.weight")),
        embedding=model.embedding_name,
        container=f"model.{container}",
        norm=norm and f"model.{norm}",
        layers=tuple(seen.layers),
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=_matrices(model, config),
        longest=getattr(config, "max_position_embeddings", None),
        uncut=uncut,
    )


def _chain(prefix: str, seen: _Seen, embedding: str, container: str, count: int) -> tuple[str | None, str]:
    """The final norm, and why hidden states do not simply go from the embedding through the layers and the norm to the
    head; empty if they do."""
    last = seen.makers[id(seen.left[prefix])].removeprefix(f"{prefix}.")
    norm = None if last in (prefix, f"{container}.{count - 1}") else last
    steps = [embedding, *(f"{container}.{i}" for i in range(count)), *([norm] if norm else [])]
    for before, after in pairwise(steps):
        positional, named = seen.entered[f"{prefix}.{after}"]
        hidden, *others = [x for x in pytree.tree_leaves((positional, named)) if isinstance(x, Tensor)]
        if hidden is not seen.left[f"{prefix}.{before}"]:
            return norm, f"something happens to hidden states between {before} and {after}"
        if any(x.requires_grad for x in others):
            return norm, f"{after} gets more than hidden states from modules before it"
    if last != steps[-1]:
        return norm, f"something happens to hidden states after {steps[-1]}"
    return norm, ""


def _matrices(model: HFModel, config: Any) -> int:
    """Elements of the matrices that a token is multiplied with; of experts those of the ones that it goes to."""
    looked_up = {id(m.weight) for m in model.model.modules() if isinstance(m, nn.Embedding)}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    total = 0
    for parameter in model.model.parameters():
        if parameter.ndim == 3 and experts and chosen and parameter.shape[0] == experts:
            total += parameter.numel() * chosen // experts
        elif parameter.ndim > 1 and id(parameter) not in looked_up:
            total += parameter.numel()
    return total + model.output.weight.numel()
