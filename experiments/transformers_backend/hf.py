"""The files of a model of transformers: its config.json, and names of tensors as the package itself would save them.

Each tensor is handed to the package's own conversion with its rows numbered instead of filled: what comes back says
under which names they are saved, and which rows went where (the package stacks experts, which files hold one by one).
Their patterns were not read instead: they are regular expressions, made for one direction.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from components.checkpoint.hf_config import Adapter
from components.checkpoint.links import Link, Links, Shape, Span, whole
from components.checkpoint.names import Rename, Rule, TheirsAlone
from components.runtime.errors import CheckpointError, ConfigError
from experiments.transformers_backend.args import CONFIG, HFArgs
from experiments.transformers_backend.attention import NAME
from experiments.transformers_backend.build import body_name, hf_config, hf_model

SILENT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of config.json that say nothing about what weights compute."""
Piece = tuple[str, int, int]
"""One of theirs, and its first row and its number of rows among all rows of ours."""


@dataclass(frozen=True)
class Stacked:
    """One of ours holds along its first dimension what they save apart, each a run of rows of one index there."""

    ours: str
    pieces: tuple[Piece, ...]

    @property
    def our_names(self) -> tuple[str, ...]:
        """See Rule."""
        return (self.ours,)

    def link(self, ours: list[tuple[str, Shape]], layer: str, into: Links) -> None:
        """See Rule."""
        ((name, (_, rows, *rest)),) = ours
        inner = tuple(rest)
        for theirs, first, count in self.pieces:
            mine = (Span(first // rows, 1), Span(first % rows, count), *whole(inner))
            shape = (count, *inner)
            into.add(Link(name, theirs.replace("{layer}", layer), mine, whole(shape)), shape)


class HFAdapter(Adapter):
    """As for a family, but fields are compared as transformers reads them, which knows all their defaults."""

    def config_problems(self, config: Mapping[str, Any], args: Any) -> list[str]:
        """See Adapter."""
        if config.get("model_type") != args.config["model_type"]:
            return [f"model_type = {config.get('model_type')!r}, this model has {args.config['model_type']!r}"]
        try:
            ours, theirs = (_fields(each) for each in (args, HFArgs(CONFIG, json.dumps(config, sort_keys=True))))
        except ConfigError as error:
            return list(error.problems)
        return [
            f"{key} = {json.dumps(theirs.get(key))}, this model has {json.dumps(ours.get(key))}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]


def _fields(args: HFArgs) -> dict[str, Any]:
    said = {key: value for key, value in hf_config(args).to_dict().items() if key not in SILENT and "drop" not in key}
    return json.loads(json.dumps(said))


@functools.lru_cache(maxsize=16)
def rules(args: HFArgs) -> tuple[Rule, ...]:
    """The table of names. Raises CheckpointError for tensors that they save in another form than rows of ours."""
    with torch.device("meta"):
        model = hf_model(args, NAME)
    body, head = f"{body_name(model)}.", f"{_head_name(model)}."
    found: dict[Rule, None] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.startswith(head) and model.config.tie_word_embeddings and name.endswith(".weight"):
            continue
        ours = "output." + name.removeprefix(head) if name.startswith(head) else "model." + name.removeprefix(body)
        found[_rule(model, ours, name, tuple(value.shape))] = None
    return tuple(found)


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _saved(model: Any, name: str, shape: Shape) -> dict[str, Any]:
    """What they save a tensor as, its rows numbered. # (…, rows, 1)"""
    from transformers.core_model_loading import revert_weight_conversion

    rows = shape[:-1] if len(shape) > 1 else shape
    numbers = torch.arange(math.prod(rows), device="cpu").view(*rows, *([1] if len(shape) > 1 else []))
    return revert_weight_conversion(model, {name: numbers})


def _rule(model: Any, ours: str, name: str, shape: Shape) -> Rule:
    pieces: list[Piece] = []
    for theirs, numbers in _saved(model, name, shape).items():
        flat = numbers.flatten()
        first, count = (int(flat[0]), len(flat)) if len(flat) else (0, 0)
        if not torch.equal(flat, torch.arange(first, first + count)):
            raise CheckpointError(
                f"{name} is saved by transformers in another form ({theirs}), which is not known here"
            )
        pieces.append((_numbered(theirs), first, count))
    rows = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
    if len(pieces) == 1 and pieces[0][2] == rows:
        return Rename(_numbered(ours), pieces[0][0])
    if len(shape) < 3 or sum(count for _, _, count in pieces) != rows:
        raise CheckpointError(
            f"{name} is saved by transformers in another form ({pieces[0][0]}), which is not known here"
        )
    return Stacked(_numbered(ours), tuple(pieces))


def _numbered(name: str) -> str:
    """A name with `{layer}` for the first number in it."""
    return re.sub(r"\.\d+\.", ".{layer}.", name, count=1)


def to_config(args: HFArgs) -> dict[str, Any]:
    """config.json as it was read, but for the type of the weights."""
    return {key: value for key, value in args.config.items() if key not in ("dtype", "torch_dtype")}


@functools.lru_cache(maxsize=16)
def extras(args: HFArgs) -> tuple[TheirsAlone, ...]:
    """What published files may hold besides: the head of a tied model, and what follows from config.json."""
    with torch.device("meta"):
        model = hf_model(args, NAME)
    derived = [_numbered(n) for n, _ in model.named_buffers() if n not in model.state_dict()]
    alone = [TheirsAlone(name) for name in dict.fromkeys(derived)]
    alone.append(TheirsAlone(f"{body_name(model)}.layers.{{layer}}.self_attn.rotary_emb.inv_freq"))
    if not model.config.tie_word_embeddings:
        return tuple(alone)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return (*alone, TheirsAlone(f"{_head_name(model)}.weight", same_as=f"{name}.weight"))


ADAPTER = HFAdapter(rules, to_config, lambda args: {}, extras)
