"""Checkpoints of TorchTitan (v0.2): which of their tensors are which of ours, and what else they say of a job.

They are torch's distributed checkpoints, with the model's tensors under their own names, `optimizer.state.<name>.<key>`
and `optimizer.param_groups.…` beside them, and `train_state.step`. Names of modules are the same as ours but for the
shared expert. Llama's heads pair neighbouring elements there, as in Meta's files, and halves here, so the rows of its
query and key matrices change places, and with them those of Adam's moments. One tensor is held at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.checkpoint.hf_weights import read_piece
from components.checkpoint.links import Link, Shape
from components.checkpoint.names import Permute, Rename, Rule, Table, TheirsAlone, apply_rules
from components.checkpoint.safetensors import some
from components.checkpoint.storage import Folder
from components.checkpoint.tensors import TensorEntry
from components.checkpoint.unpickle import Contents, read_contents
from components.runtime.errors import CheckpointError

_OTHER_PARTS = ("optimizer", "lr_scheduler", "dataloader", "train_state", "ft_dataloader")
_STATE = "optimizer.state."
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


def titan_table(shapes: Mapping[str, Shape], neighbours: Mapping[str, int], tied: bool) -> Table:
    """The table of a model whose tensors have these names and shapes. `neighbours`: names of matrices whose rows are
    those of heads that pair neighbours there and halves here, with the number of heads. `tied`: their head is a second
    name of the embedding. Raises CheckpointError."""
    extras = (TheirsAlone("output.weight", same_as="tok_embeddings.weight"),) if tied else ()
    return apply_rules([_rule(name, shape, neighbours.get(name)) for name, shape in shapes.items()], extras, shapes)


def _rule(name: str, shape: Shape, heads: int | None) -> Rule:
    theirs = name.replace(".moe.shared.", ".moe.shared_experts.")
    if heads is None:
        return Rename(name, theirs, buffer=name.endswith(".expert_bias"))  # which no optimizer steps
    return Permute(name, theirs, (heads, shape[0] // heads // 2, 2), (0, 2, 1))


@dataclass(frozen=True)
class TitanCheckpoint:
    """One of their checkpoints, opened."""

    folder: Folder
    """Where it is."""
    contents: Contents
    """What it holds."""

    @property
    def model(self) -> dict[str, TensorEntry]:
        """The model's tensors."""
        return {
            name: entry for name, entry in self.contents.tensors.items() if name.partition(".")[0] not in _OTHER_PARTS
        }

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer's state was saved."""
        return any(name.startswith(_STATE) for name in self.contents.tensors)

    def number(self, name: str) -> int | None:
        """A count of `train_state`; None if there is none. Raises CheckpointError for what is no count."""
        name = f"train_state.{name}"
        if name in self.contents.objects:
            value = self.contents.value(self.folder, name)
        elif name in self.contents.tensors:
            value = self.tensor(name)
        else:
            return None
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{name} is no count")
        return value

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole. Raises CheckpointError, OSError."""
        entry = self.contents.tensors[name]
        whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for piece in entry.pieces:
            box = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
            whole[box] = read_piece(self.folder, entry, piece)
        return whole

    def require_model(self, table: Table) -> None:
        """Raise CheckpointError with all that is missing, not expected or misshapen in the model's tensors, and for a
        copy that differs from what it must equal."""
        self._require("", table)
        for name in {*self.model} - {*table.theirs}:
            extra = table.extra(name)
            same = extra.same_as if extra is not None else None
            if same is not None and not torch.equal(self.tensor(name), self.tensor(same)):
                raise CheckpointError(f"{name} is not the same as {same}, to which this model ties it")

    def require_optimizer(self, table: Table) -> None:
        """The same for Adam's state. Raises CheckpointError also for another optimizer's."""
        keys = {name.rpartition(".")[2] for name in self.contents.tensors if name.startswith(_STATE)}
        if keys != {*_MOMENTS, _STEP}:
            raise CheckpointError(f"its optimizer keeps {some(keys)}: only Adam's and AdamW's state is taken over")
        for key in (*_MOMENTS, _STEP):
            self._require(key, table)

    def _require(self, key: str, table: Table) -> None:
        """Model tensors, or with a key of the optimizer's state those that belong to them."""
        found = {self._plain(name, key): entry for name, entry in self.contents.tensors.items() if self._is(name, key)}
        problems = []
        if missing := {*table.theirs} - {*found} - (table.buffers if key else set()):
            problems.append(f"missing: {some(missing)}")
        if unexpected := [name for name in {*found} - {*table.theirs} if table.extra(name) is None]:
            problems.append(f"not expected: {some(unexpected)}")
        for name in sorted({*found} & {*table.theirs}):
            if key != _STEP and tuple(found[name].shape) != table.theirs[name]:
                problems.append(f"{name} has shape {found[name].shape}, this model {[*table.theirs[name]]}")
        if problems:
            what = f"{_STATE}*.{key}" if key else "the model's tensors"
            raise CheckpointError(f"'{self.folder.path}': {what} do not fit: {'; '.join(problems)}")

    def _is(self, name: str, key: str) -> bool:
        return name.startswith(_STATE) and name.endswith(f".{key}") if key else name in self.model

    def _plain(self, name: str, key: str) -> str:
        return name.removeprefix(_STATE).removesuffix(f".{key}") if key else name

    def sources(self, table: Table, optimizer: bool) -> dict[str, tuple[Shape, str, Callable[[], Tensor]]]:
        """Our tensors, by the names they have in a checkpoint of ours: shape, type, and what makes them."""
        links: dict[str, list[Link]] = {}
        for link in table.links:
            links.setdefault(link.ours, []).append(link)
        made: dict[str, tuple[Shape, str, Callable[[], Tensor]]] = {}
        for ours, of_ours in links.items():
            theirs, shape = of_ours[0].theirs, table.ours[ours]
            made[f"model.{ours}"] = (shape, self._type(theirs), self._maker(of_ours, shape, theirs))
            if not optimizer or ours in table.buffers:
                continue
            for key in _MOMENTS:
                name = f"{_STATE}{theirs}.{key}"
                made[f"optimizer.{ours}.{key}"] = (shape, self._type(name), self._maker(of_ours, shape, name))
            name = f"{_STATE}{theirs}.{_STEP}"
            made[f"optimizer.{ours}.{_STEP}"] = ((), self._type(name), lambda name=name: self.tensor(name).reshape(()))
        return made

    def _type(self, name: str) -> str:
        return self.contents.tensors[name].dtype

    def _maker(self, links: list[Link], shape: Shape, name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            theirs = self.tensor(name)
            ours = torch.empty(shape, dtype=theirs.dtype)
            for link in links:
                target = ours[tuple(span.slice for span in link.our_part)]
                target.copy_(theirs[tuple(span.slice for span in link.their_part)].reshape(target.shape))
            return ours

        return make


def open_titan(folder: Folder) -> TitanCheckpoint:
    """One of their checkpoints; runs no code of it. Raises CheckpointError, OSError."""
    return TitanCheckpoint(folder, read_contents(folder))


def train_state(checkpoint: TitanCheckpoint, step: int) -> dict[str, Any]:
    """What their `train_state` is here. Bad steps are unknown to them."""
    tokens = checkpoint.number("ntokens_seen")
    return {"step": step, "tokens": tokens or 0, "recent": [], "passed_over": []}
