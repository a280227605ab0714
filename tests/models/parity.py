"""Our model and transformers' with the same weights: logits, loss and every gradient, packed documents included.

The twin is made by exporting ours and letting transformers load that, so names and config.json are tried as well. Its
gradients come back through the same door: they are put in the place of its weights, saved as transformers saves
weights, and imported; so no table of names but the family's own is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.checkpoint.hf_config import Adapter
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.train_spec import families
from tests.models.hf_twins import build, export, load, save

IGNORE = -100
TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value."""
FLOOR = 1e-8
"""Largest difference where the value is 0 but for rounding: a router's gradient where its one weight is normalized."""


@dataclass(frozen=True)
class Text:
    """Rows of documents, one after the other."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    ids: Tensor | None
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, vocab_size: int, lengths: tuple[int, ...], rows: int = 2) -> "Text":
        """Random rows, each of documents of these lengths; every seventh label is none."""
        seq, draw = sum(lengths), torch.Generator().manual_seed(sum(lengths))
        tokens = torch.randint(0, vocab_size, (rows, seq), generator=draw)
        labels = torch.randint(0, vocab_size, (rows, seq), generator=draw)
        labels[:, ::7] = IGNORE
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, seq)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(rows, seq)
        return cls(tokens, labels, positions, ids if len(lengths) > 1 else None, lengths)


@dataclass(frozen=True)
class Found:
    """What a model makes of a text."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def adapter_of(family: str) -> Adapter:
    """The family's."""
    adapter = families.lookup(family).load().state_dict_adapter
    assert adapter is not None
    return adapter


def ours(model: Decoder, text: Text) -> Found:
    """What our model makes of it."""
    model.zero_grad()
    logits = model.output(model(text.tokens, text.positions, text.ids))
    loss = _loss(logits, text.labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len([*model.parameters()])
    return Found(logits.detach(), loss.detach(), gradients)


def theirs(twin: nn.Module, text: Text, adapter: Adapter, args: DecoderArgs, folder: Path) -> Found:
    """What transformers' model makes of each document alone."""
    twin.zero_grad()
    parts = [twin(input_ids=part, use_cache=False).logits for part in text.tokens.split(text.lengths, dim=1)]
    logits = torch.cat(parts, dim=1)
    loss = _loss(logits, text.labels)
    loss.backward()
    kept = {name: p.detach().clone() for name, p in twin.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        cast(Any, twin).save_pretrained(folder)
        twin.load_state_dict(kept)
    image = Decoder(args)
    load(folder, image, adapter, args)
    gradients = {name: parameter.detach() for name, parameter in image.named_parameters()}
    return Found(logits.detach(), loss.detach(), gradients)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def twins(family: str, args: DecoderArgs, root: Path, attention: str, seed: int = 0) -> tuple[Decoder, nn.Module]:
    """Ours, and transformers' with the same weights."""
    from transformers import AutoModelForCausalLM

    model = build(Decoder, args, seed)
    save(root, model)
    folder = export(root, adapter_of(family), args, shard_bytes=40_000)
    twin, info = AutoModelForCausalLM.from_pretrained(
        folder.path,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation=attention,
        experts_implementation="eager",  # its grouped matmul takes only some widths
    )
    assert {key: [*value] for key, value in info.items() if value} == {}
    return model, twin.train()


def require_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError unless they agree, relative to the largest value."""
    assert actual.shape == expected.shape, name
    largest = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * largest + FLOOR, f"{name}: {difference} of {largest}"


def require_agreement(
    family: str, args: DecoderArgs, root: Path, texts: tuple[Text, ...], attention: str = "sdpa", seed: int = 0
) -> None:
    """Logits, loss and every gradient of each text."""
    model, twin = twins(family, args, root, attention, seed)
    for number, text in enumerate(texts):
        mine = ours(model, text)
        want = theirs(twin, text, adapter_of(family), args, root / f"gradients-{number}")
        require_close("logits", mine.logits, want.logits)
        require_close("loss", mine.loss, want.loss)
        assert mine.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            require_close(name, mine.gradients[name], gradient)
