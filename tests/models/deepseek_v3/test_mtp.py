"""Multi-token prediction against its definition written out: document by document, each as long as it has labels."""

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.layers.initialize import initialize
from components.loss.ahead import AheadLoss, look_ahead
from components.loss.cross_entropy import ChunkedCrossEntropy, CrossEntropy, LossFn
from components.mesh.batch import IGNORE, Batch
from models.decoder.model import Block, Decoder
from models.deepseek_v3.args import DeepseekV3Args
from tests.models.deepseek_v3.tiny import DENSE, TINY, Loud

LENGTHS = ([7, 1, 2, 9], [3, 16])
COEFFICIENT = 0.4


def build(args: DeepseekV3Args) -> Decoder:
    model = Loud(args)
    initialize(model, model.inits(), 3)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def packed(documents: bool = True) -> Batch:
    """Two rows of documents; some labels are masked, as prompts are."""
    draw = torch.Generator().manual_seed(1)
    data = torch.randint(0, TINY.vocab_size, (2, 20), generator=draw)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS])
    tokens, labels = data[:, :-1], data[:, 1:].clone()
    labels[:, 4] = labels[:, 9] = IGNORE
    positions = torch.arange(19).expand(2, 19)
    if documents:
        ends = F.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)
        labels = labels.masked_fill(ends, IGNORE)
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return Batch(tokens, labels, positions, ids)


def objective(model: Decoder, loss: LossFn, batch: Batch, documents: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimized as the Trainer computes it, each row's loss, and each row's labels."""
    batch = look_ahead(batch, model.args.mtp_layers, documents)
    assert batch.ahead_tokens is not None
    assert batch.ahead_labels is not None
    valid = (batch.labels != IGNORE).sum()
    shares = (batch.labels != IGNORE) / valid
    ahead = {"ahead": batch.ahead_tokens, "ahead_shares": (batch.ahead_labels != IGNORE) / valid}
    ids = batch.document_ids if documents else None
    hidden = model(batch.tokens, batch.positions, ids, shares=shares, **ahead)
    sums, counts = AheadLoss(loss, COEFFICIENT)(hidden, model.output, batch)
    return sums.sum() / valid, sums, counts


def written_out(model: Decoder, batch: Batch, documents: bool) -> tuple[Tensor, Tensor]:
    """The main loss, and the sum over modules of theirs divided by their number; both over the main loss's labels."""
    main = ahead = torch.zeros(())
    lengths = LENGTHS if documents else ([19], [19])
    for row, of_row in enumerate(lengths):
        tokens, labels = batch.tokens[row].split(of_row), batch.labels[row].split(of_row)
        for text, wanted in zip(tokens, labels, strict=True):
            hidden = model(text[None], torch.arange(len(text))[None])
            main = main + F.cross_entropy(model.output(hidden)[0], wanted, reduction="sum")
            for k in range(1, min(model.args.mtp_layers, len(text) - 1) + 1):
                module, left = model.mtp[str(k - 1)], len(text) - k
                w = cast(Tensor, module.get_parameter("eh_proj.weight"))
                token = F.rms_norm(model.tok_embeddings(text[k:]), (24,), module.get_parameter("enorm.weight"), 1e-6)
                before = F.rms_norm(hidden[0, :left], (24,), module.get_parameter("hnorm.weight"), 1e-6)
                x = token @ w[:, :24].T + before @ w[:, 24:].T
                block, positions = cast(Block, module.block), torch.arange(left)[None]
                turn, mask = model._around([block], positions, None)(block)
                x, _ = block(x[None], turn, mask, positions, None)
                hidden = F.rms_norm(x, (24,), model.get_parameter(f"mtp_norms.{k - 1}.weight"), 1e-6)
                logits = hidden[0] @ model.output.weight.T
                ahead = ahead + F.cross_entropy(logits, wanted[k:], reduction="sum") / model.args.mtp_layers
    valid = (batch.labels != IGNORE).sum()
    return main / valid, ahead / valid


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


UNBALANCED = replace(TINY, experts=replace(TINY.experts, balance_coefficient=0.0))


@pytest.mark.parametrize("loss", [CrossEntropy(), ChunkedCrossEntropy(5)], ids=["at once", "in chunks"])
@pytest.mark.parametrize("args", [DENSE, replace(DENSE, mtp_layers=1), UNBALANCED], ids=["dense", "one", "experts"])
def test_value_and_gradients_are_the_definition(args: DeepseekV3Args, loss: LossFn) -> None:
    for documents in (True, False):
        model, batch = build(args), packed(documents)
        found, _, counts = objective(model, loss, batch, documents)
        found.backward()
        mine = gradients(model)
        main, ahead = written_out(model, batch, documents)
        (main + COEFFICIENT * ahead).backward()
        want = gradients(model)
        torch.testing.assert_close(found, main, rtol=1e-5, atol=0)
        assert counts.tolist() == (batch.labels != IGNORE).sum(1).tolist()
        assert mine.keys() == want.keys() == dict(model.named_parameters()).keys()
        for name, gradient in want.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_labels_ahead_written_out() -> None:
    rows = torch.tensor([[10, 11, 12, 13, 14, 15]])
    labels = torch.tensor([[11, 12, IGNORE, 14, IGNORE, 16]])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    batch = Batch(rows, labels, torch.arange(6)[None], ids)
    found = look_ahead(batch, 2, documents=True)
    assert found.ahead_tokens is not None
    assert found.ahead_labels is not None
    assert found.ahead_tokens[0, :, 0].tolist() == [11, 12, 13, 14, 15, 0]
    assert found.ahead_tokens[0, :, 1].tolist() == [12, 13, 14, 15, 0, 0]
    assert found.ahead_labels[0, :, 0].tolist() == [12, IGNORE, IGNORE, IGNORE, 16, IGNORE]
    assert found.ahead_labels[0, :, 1].tolist() == [IGNORE, IGNORE, IGNORE, 16, IGNORE, IGNORE]
    across = look_ahead(batch, 1, documents=False).ahead_labels
    assert across is not None
    assert across[0, :, 0].tolist() == [12, IGNORE, 14, IGNORE, 16, IGNORE]
    assert Batch.unstacked(found.stacked()).map(lambda x: x.sum()) == found.map(lambda x: x.sum())
    beyond = cast(Tensor, look_ahead(batch, 9, documents=True).ahead_labels)
    assert beyond[0, :, 8].tolist() == [IGNORE] * 6  # the row ends before


def test_counts_of_modules_are_those_of_their_labels() -> None:
    model, batch = build(TINY), packed()
    objective(model, CrossEntropy(), batch, documents=True)
    layers = ["layers.1.moe", "mtp.0.block.moe", "mtp.1.block.moe"]
    seen = [int(model.get_buffer(f"{name}.tokens_per_expert").sum()) for name in layers]
    ahead = look_ahead(batch, 2, documents=True).ahead_labels
    assert ahead is not None
    labels = [batch.labels, *ahead.unbind(-1)]
    assert seen == [2 * int((of != IGNORE).sum()) for of in labels]
    assert seen[0] > seen[1] > seen[2] > 0


def test_evaluation_leaves_modules_out() -> None:
    model, batch = build(TINY), packed()
    plain = Loud(replace(TINY, mtp_layers=0))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp")})
    arguments = (batch.tokens, batch.positions, batch.document_ids)
    assert torch.equal(model(*arguments), plain(*arguments))
    loss = AheadLoss(CrossEntropy(), COEFFICIENT)
    assert torch.equal(
        loss(model(*arguments), model.output, batch).sums, CrossEntropy()(plain(*arguments), plain.output, batch).sums
    )
