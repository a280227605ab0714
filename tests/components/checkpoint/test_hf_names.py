"""Rules of names: the links they become, cut by boxes and followed in both directions."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from components.checkpoint.links import Link, Shapes, Span, natural
from components.checkpoint.names import (
    Merge,
    OursAlone,
    Permute,
    Rename,
    Rule,
    Split,
    StackExperts,
    Table,
    TheirsAlone,
    apply_rules,
)
from components.runtime.errors import CheckpointError


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def numbered(**sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors whose elements all differ."""
    start = itertools.accumulate([0, *(torch.Size(size).numel() for size in sizes.values())])
    return {
        name.replace("__", "."): torch.arange(float(first), float(first + torch.Size(size).numel())).reshape(size)
        for first, (name, size) in zip(start, sizes.items(), strict=False)
    }


def their_side(link: Link, theirs: Mapping[str, Tensor]) -> Tensor:
    """The link's elements of theirs, in our orientation."""
    part = theirs[link.theirs][tuple(span.slice for span in link.their_part)]
    return part.transpose(-1, -2) if link.transposed else part


def our_slice(link: Link) -> tuple[slice, ...]:
    return tuple(span.slice for span in link.our_part)


def to_theirs(table: Table, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs = {name: torch.full(shape, torch.nan) for name, shape in table.theirs.items()}
    for link in table.links:
        part = their_side(link, theirs)
        part.copy_(ours[link.ours][our_slice(link)].reshape(part.shape))
    return theirs


def to_ours(table: Table, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {name: torch.full(shape, torch.nan) for name, shape in table.ours.items()}
    for link in table.links:
        part = ours[link.ours][our_slice(link)]
        part.copy_(their_side(link, theirs).reshape(part.shape))
    return ours


RULES: dict[str, tuple[Rule, dict[str, Tensor]]] = {
    "rename": (
        Rename("l.{layer}.w", "model.{layer}.weight"),
        numbered(l__0__w=(3, 2), l__10__w=(3, 2), l__2__w=(3, 2)),
    ),
    "permute": (Permute("w", "meta", (3, 4, 2), (0, 2, 1)), numbered(w=(24, 5))),
    "permute norm": (Permute("w", "meta", (4, 2), (1, 0)), numbered(w=(8,))),
    "merge": (Merge(("{layer}.q", "{layer}.k"), "{layer}.qk"), numbered(**{"0__q": (4, 3), "0__k": (2, 3)})),
    "merge inner": (Merge(("w1", "w3"), "gate_up", dim=1), numbered(w1=(2, 3, 4), w3=(2, 3, 4))),
    "transposed": (Rename("{layer}.w2", "{layer}.down", transposed=True), numbered(**{"0__w2": (2, 3, 4)})),
    "transposed matrix": (Rename("w", "x", transposed=True), numbered(w=(5, 4))),
    "merge transposed": (
        Merge(("w1", "w3"), "gate_up", dim=1, transposed=True),
        numbered(w1=(2, 3, 4), w3=(2, 3, 4)),
    ),
    "merge inner transposed": (Merge(("a", "b"), "ab", dim=1, transposed=True), numbered(a=(2, 3), b=(2, 4))),
    "take turns": (
        Merge(("w1", "w3"), "gate_up", dim=1, interleaved=True, transposed=True),
        numbered(w1=(2, 3, 4), w3=(2, 3, 4)),
    ),
    "biases take turns": (
        Merge(("{layer}.b1", "{layer}.b3"), "{layer}.bias", dim=1, interleaved=True),
        numbered(**{"2__b1": (3, 4), "2__b3": (3, 4)}),
    ),
    "three take turns": (Merge(("a", "b", "c"), "abc", interleaved=True), numbered(a=(2, 3), b=(2, 3), c=(2, 3))),
    "split": (Split("qkv", ("q", "k", "v"), (4, 1, 1)), numbered(qkv=(6, 3))),
    "split inner": (Split("{layer}.w", ("{layer}.a", "{layer}.b"), (1, 3), dim=1), numbered(**{"7__w": (2, 4)})),
    "experts": (StackExperts("{layer}.w1", "{layer}.e.{expert}.gate"), numbered(**{"3__w1": (3, 2, 5)})),
}


@pytest.mark.parametrize("name", RULES)
def test_there_and_back(name: str) -> None:
    rule, ours = RULES[name]
    table = apply_rules([rule], (), shapes(ours))
    theirs = to_theirs(table, ours)
    assert shapes(theirs) == table.theirs
    assert sorted(torch.cat([t.flatten() for t in theirs.values()]).tolist()) == sorted(
        torch.cat([t.flatten() for t in ours.values()]).tolist()
    )
    back = to_ours(table, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_what_each_rule_makes() -> None:
    def theirs(name: str) -> dict[str, Tensor]:
        rule, ours = RULES[name]
        return to_theirs(apply_rules([rule], (), shapes(ours)), ours)

    assert [*theirs("rename")] == ["model.0.weight", "model.2.weight", "model.10.weight"]
    ours = RULES["permute"][1]["w"]  # Meta's own conversion, the other way round
    assert torch.equal(theirs("permute")["meta"], ours.view(3, 2, 4, 5).transpose(1, 2).reshape(24, 5))
    assert torch.equal(theirs("merge")["0.qk"], torch.arange(18.0).view(6, 3))
    assert theirs("merge inner")["gate_up"][:, :, 0].tolist() == [[0, 4, 8, 24, 28, 32], [12, 16, 20, 36, 40, 44]]
    assert torch.equal(theirs("transposed")["0.down"], RULES["transposed"][1]["0.w2"].transpose(1, 2))
    w1, w3 = (RULES["take turns"][1][name].transpose(1, 2) for name in ("w1", "w3"))
    assert torch.equal(theirs("merge transposed")["gate_up"], torch.cat((w1, w3), dim=2))
    assert torch.equal(theirs("take turns")["gate_up"], torch.stack((w1, w3), dim=3).flatten(2))
    a, b = RULES["merge inner transposed"][1].values()
    assert torch.equal(theirs("merge inner transposed")["ab"], torch.cat((a, b), dim=1).T)
    assert theirs("biases take turns")["2.bias"].tolist() == [
        [0, 12, 1, 13, 2, 14, 3, 15],
        [4, 16, 5, 17, 6, 18, 7, 19],
        [8, 20, 9, 21, 10, 22, 11, 23],
    ]
    assert theirs("three take turns")["abc"][:, 0].tolist() == [0, 6, 12, 3, 9, 15]
    assert shapes(theirs("split")) == {"q": (4, 3), "k": (1, 3), "v": (1, 3)}
    assert theirs("split inner")["7.b"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert theirs("experts")["3.e.2.gate"].tolist() == [[20, 21, 22, 23, 24], [25, 26, 27, 28, 29]]


@pytest.mark.parametrize("name", RULES)
def test_boxes_of_ours_cut_links(name: str) -> None:
    """Every box of ours, filled through the links that are cut to it, has what the whole has there."""
    rule, ours = RULES[name]
    table = apply_rules([rule], (), shapes(ours))
    theirs = to_theirs(table, ours)
    for key, whole in ours.items():
        ranges = [[(a, b) for a in range(n) for b in range(a, n + 1)] for n in whole.shape]
        for box in itertools.islice(itertools.product(*ranges), 0, None, 7):
            slices = tuple(slice(a, b) for a, b in box)
            found = torch.full_like(whole[slices], torch.nan)
            for link in table.links:
                offsets = tuple(a for a, _ in box)
                if link.ours == key and (cut := link.within(offsets, tuple(b - a for a, b in box))):
                    part = found[our_slice(cut)]
                    part.copy_(their_side(cut, theirs).reshape(part.shape))
                    assert cut.count == part.numel()
            assert torch.equal(found, whole[slices])


def test_a_span_and_the_order_of_names() -> None:
    assert list(range(20))[Span(3, 4, 5).slice] == [3, 8, 13, 18]
    assert sorted(["l.10.w", "l.9.w", "norm", "l.9.b"], key=natural) == ["l.9.b", "l.9.w", "l.10.w", "norm"]


def test_what_does_not_fit_is_told() -> None:
    def refused(*rules: Rule, **sizes: tuple[int, ...]) -> str:
        with pytest.raises(CheckpointError) as error:
            apply_rules(rules, (), shapes(numbered(**sizes)))
        return str(error.value)

    told = refused(Rename("a", "x"), Rename("a", "y"), a=(2,), b=(2,))
    assert told == "the family's table of names does not fit: a is in 2 rules; b is in 0 rules"
    assert refused(Merge(("a", "b"), "ab"), a=(2,)) == "a has no table entry without b, which is not there"
    assert refused(Split("a", ("x", "y"), (1, 2)), a=(2,)) == "a: 2 along dimension 0 do not split into (1, 2)"
    assert (
        refused(Permute("a", "x", (2, 2), (1, 0)), a=(6,)) == "a: 6 rows cannot be seen as (2, 2) in the order (1, 0)"
    )
    turns = refused(Merge(("a", "b"), "ab", interleaved=True), a=(2,), b=(3,))
    assert turns == "a: [2, 3] along dimension 0 cannot take turns"
    for rule in (Rename("a", "x", transposed=True), Merge(("a",), "x", transposed=True)):
        assert refused(rule, a=(2,)) == "a: shape [2] has no two dimensions to transpose"
    assert "x: 4 of 2 elements" in refused(Rename("a", "x"), Rename("b", "x"), a=(2,), b=(2,))
    assert "L.0.w is in 0 rules" in refused(Rename("l.{layer}.w", "x"), L__0__w=(2,))


def test_tensors_of_one_side_alone() -> None:
    ours = numbered(w=(2,), m__0__bias=(3,))
    extras = (TheirsAlone("l.{layer}.freq"), TheirsAlone("head", same_as="x"))
    table = apply_rules([Rename("w", "x"), OursAlone("m.{layer}.bias", "the bias")], extras, shapes(ours))
    assert (table.ours, table.theirs, table.alone) == ({"w": (2,)}, {"x": (2,)}, {"m.0.bias": "the bias"})
    assert [table.extra(name) for name in ("l.12.freq", "head", "l.x.freq", "lx1xfreq")] == [*extras, None, None]
