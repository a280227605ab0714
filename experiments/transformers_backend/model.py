"""A model of transformers as the Trainer asks for it: its body without the head, and the head as a module `output`.

Their forward runs as it is, on every stage of a pipeline and under tensor parallelism: rows, mask and positions reach
it through the package's own extension points (`attention`). Writing the loop over layers anew was rejected: what stands
before and around it differs from model to model.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home; torch's own documentation imports it here

from components.layers.head import Head
from components.layers.initialize import Init
from components.mesh.projection import Projection
from experiments.transformers_backend.args import HFArgs
from experiments.transformers_backend.attention import NAME, ROWS, Rows
from experiments.transformers_backend.build import body_name, hf_model, refusal
from experiments.transformers_backend.first_values import FirstValues, record

Bend = Callable[[Tensor], Tensor]


class Elsewhere(nn.Identity):
    """A layer that another stage of the pipeline holds: hidden states pass."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first argument."""
        return input


class BentHead(Head):
    """A head whose logits are scaled, or bent to stay within bounds."""

    bend: Bend | None = None

    def forward(self, input: Tensor, apply: Callable[[Tensor, Projection], Any] | None = None) -> Any:
        """See `Head`."""
        return self.bent(super().forward, input, apply)

    def bent(
        self, forward: Callable[..., Any], input: Tensor, apply: Callable[[Tensor, Projection], Any] | None = None
    ) -> Any:
        """What the head does, around a `forward` that gives plain logits."""
        bend = self.bend
        if bend is None:
            return forward(input, apply)

        def with_bent(hidden: Tensor, project: Projection) -> Any:
            own = Projection(_after(project.local, bend), project.shard)
            return own(hidden) if apply is None else apply(hidden, own)

        return forward(input, with_bent)


class HFModel(nn.Module):
    """The model. Parameters are named as theirs, but the body's prefix is `model`, and the head's name `output`."""

    def __init__(self, args: HFArgs) -> None:
        super().__init__()
        whole = hf_model(args, NAME)
        first = record(whole)
        self.take(args, whole, first)

    def take(self, args: HFArgs, whole: Any, first: FirstValues) -> None:
        """Be made of that model, whose first values are known."""
        self.args = args
        self.model = whole.get_submodule(body_name(whole))
        self.embedding_name = "model." + _name_of(self.model, whole.get_input_embeddings())
        self.output = _head(args, whole)
        self.derived = first.derived
        self.first = {name: first.inits[id(p)] for name, p in self.named_parameters(remove_duplicate=False)}

    def forward(self, x: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, or those that go on to the next stage.

        Args:
            x: Token ids, or in later stages hidden states. # (rows, seq) or (rows, seq, dim)
            positions: Place of each token in its document. # (rows, seq)
            document_ids: Number of each token's document: attention stays within it. None: causal. # (rows, seq)

        Returns:
            # (rows, seq, dim)
        """
        for derived in self.derived:
            derived.place(x.device)
        body = cast(Any, self.model)
        valueless = x.is_meta or isinstance(x, FakeTensor)
        body.config._experts_implementation = "batched_mm" if valueless else "grouped_mm"  # the other needs bfloat16
        later = isinstance(self.get_submodule(self.embedding_name), nn.Identity)
        setattr(body.config, ROWS, Rows(positions, document_ids))
        try:
            return body(
                **{"inputs_embeds" if later else "input_ids": x},
                attention_mask=torch.ones_like(positions),  # so that documents are not looked for in positions
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
        finally:
            delattr(body.config, ROWS)

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialized, by name: as transformers does."""
        return self.first


def _after(first: Bend, then: Bend) -> Bend:
    return lambda x: then(first(x))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _head(args: HFArgs, whole: Any) -> BentHead:
    """The head, with the very parameters of theirs."""
    theirs = whole.get_output_embeddings()
    if not isinstance(theirs, nn.Linear):
        raise refusal(args, f"the head is a {type(theirs).__name__}, not a linear layer")
    head = BentHead(theirs.in_features, theirs.out_features)
    head.weight, head.bias = theirs.weight, theirs.bias
    head.bend = bend_of(whole.config)
    return head


def bend_of(config: Any) -> Bend | None:
    """What a model does to its logits after the head, by the fields of config.json that say so; None: nothing."""
    if cap := getattr(config, "final_logit_softcapping", None):
        return lambda logits: cap * torch.tanh(logits / cap)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        return lambda logits: logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        return lambda logits: logits / divisor
    return None
