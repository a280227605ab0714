"""The mixture-of-experts layer against a plain loop over tokens, the balance loss against its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers import experts as grouping
from components.layers.experts import Experts, can_group
from components.layers.feed_forward import FeedForward
from components.layers.initialize import Constant, Normal
from components.layers.moe import MoE, SelectionBias
from components.layers.shapes import ExpertsShape
from components.mesh.experts import back, by_expert, combine, routed
from components.runtime.errors import ConfigError

Settings = dict[str, Any]

DIM, HIDDEN, EXPERTS, K = 8, 12, 5, 2
ROWS, SEQ = 3, 7


def make(dim: int = DIM, hidden: int = HIDDEN, **settings: Any) -> MoE:
    plain = Settings(count=EXPERTS, per_token=K, hidden=hidden, balance_coefficient=0.0)
    layer = MoE(dim, ExpertsShape(**plain | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if layer.shape.selection_bias and layer.expert_bias is not None:
            layer.expert_bias.copy_(torch.randn(layer.n_experts, generator=generator) / 5)
    return layer


def inputs(dim: int = DIM) -> Tensor:
    return torch.randn(ROWS, SEQ, dim, generator=torch.Generator().manual_seed(2), requires_grad=True)


POSITIONS = torch.arange(SEQ).expand(ROWS, SEQ)


def act(name: str, gate: Tensor, value: Tensor) -> Tensor:
    if name == "clamped_swiglu":
        gate, value = gate.clamp(max=7.0), value.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (value + 1)
    return (F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")) * value


def choices(layer: MoE, scores: Tensor) -> list[int]:
    """The experts of one token, without a sort of tensors."""
    shape, bias = layer.shape, layer.expert_bias
    rated = (scores if bias is None else scores + bias).tolist()
    size = shape.count // shape.groups
    members = [range(g * size, (g + 1) * size) for g in range(shape.groups)]
    best = [
        sorted((rated[e] for e in group), reverse=True)[: 1 if shape.group_score == "max" else 2] for group in members
    ]
    order = sorted(range(shape.groups), key=lambda g: -sum(best[g]))
    allowed = [e for g in order[: shape.top_groups] for e in members[g]]
    return sorted(allowed, key=lambda e: -rated[e])[: shape.per_token]


def of_experts(layer: MoE, x: Tensor) -> Tensor:
    """One token's share of the routed experts. # (dim,)"""
    shape, gate, experts = layer.shape, layer.router.gate, layer.experts
    logits = gate.weight @ x if gate.bias is None else gate.weight @ x + gate.bias
    scores = logits.sigmoid() if shape.score == "sigmoid" else logits.softmax(0)
    chosen = choices(layer, scores)
    total = sum((scores[e] for e in chosen), torch.zeros(())) if shape.normalize else 1.0
    out = torch.zeros_like(x)
    for e in chosen:
        weight = scores[e] / total * shape.scale
        y = x * weight if shape.scale_input else x
        b1, b2, b3 = (0.0 if b is None else b[e] for b in (experts.b1, experts.b2, experts.b3))
        y = experts.w2[e] @ act(shape.activation, experts.w1[e] @ y + b1, experts.w3[e] @ y + b3) + b2
        out = out + (y if shape.scale_input else weight * y)
    return out


def of_shared(shared: FeedForward, x: Tensor) -> Tensor:
    return shared.w2.weight @ act(shared.activation, shared.w1.weight @ x, shared.w3.weight @ x)


def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    tokens = [of_experts(layer, token) for token in x.flatten(0, 1)]
    if layer.shared is not None:
        shared = layer.shared
        tokens = [out + of_shared(shared, token) for out, token in zip(tokens, x.flatten(0, 1), strict=True)]
    return torch.stack(tokens).view(x.shape)


def gradients(layer: MoE, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


DEEPSEEK = Settings(
    count=8, per_token=3, score="sigmoid", groups=4, top_groups=2, scale=2.5, selection_bias=True, shared_hidden=10
)
GPT_OSS = Settings(router_bias=True, bias=True, activation="clamped_swiglu")
LLAMA4 = Settings(per_token=1, score="sigmoid", normalize=False, scale_input=True, shared_hidden=10)
VARIANTS: dict[str, Settings] = {
    "normalized": {},
    "as they are": Settings(normalize=False),
    "deepseek v3": DEEPSEEK,
    "deepseek v2": Settings(
        count=6, per_token=2, normalize=False, groups=3, top_groups=2, group_score="max", scale=16.0, shared_hidden=10
    ),
    "gpt-oss": GPT_OSS,
    "llama 4": LLAMA4,
    "two weighted inputs": LLAMA4 | Settings(per_token=2, activation="gelu_tanh"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dim", "hidden", "grouped"), [(8, 12, True), (7, 9, False)])
def test_values_and_gradients(dim: int, hidden: int, grouped: bool, variant: str) -> None:
    assert can_group(torch.device("cpu"), torch.float32, dim, hidden) == grouped
    found: list[dict[str, Tensor]] = []
    compute: list[Callable[[MoE, Tensor], Tensor]] = [by_hand, lambda layer, x: layer(x, POSITIONS)[0]]
    for run in compute:
        layer, x = make(dim, hidden, **VARIANTS[variant]), inputs(dim)
        out = run(layer, x)
        found.append(gradients(layer, out, x) | {"out": out.detach()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=2e-5 * float(value.abs().max()), msg=name)


def test_the_variants_matter() -> None:
    """Each setting changes what comes out: groups exclude, biases choose, gates are clamped."""
    x = inputs()
    whole, none = Settings(groups=1, top_groups=1), Settings(selection_bias=False)
    for settings, other in ((DEEPSEEK, whole), (DEEPSEEK, none), (GPT_OSS, Settings(activation="silu"))):
        assert not torch.allclose(make(**settings)(x, POSITIONS)[0], make(**settings | other)(x, POSITIONS)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("counts", [(0, 3, 0, 1, 0), (0, 0, 0, 0, 0), (4, 0, 0, 0, 0)])
def test_empty_experts_have_gradients_of_zero(dim: int, counts: tuple[int, ...], bias: bool) -> None:
    experts = Experts(dim, ExpertsShape(EXPERTS, K, HIDDEN, bias=bias))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(0.5)
    x = torch.ones(sum(counts), dim, requires_grad=True)
    out = experts.compute(x, torch.tensor(counts))
    assert out.shape == x.shape
    out.backward(torch.ones_like(out))
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert [bool(g.abs().sum() > 0) for g in parameter.grad] == [count > 0 for count in counts]


def test_where_grouping_fails_experts_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(**GPT_OSS), inputs()
    expected = layer(x, POSITIONS)[0]
    monkeypatch.setattr(grouping, "can_group", lambda *shape: False)
    torch.testing.assert_close(layer(x, POSITIONS)[0], expected)


def test_a_kernel_that_leaves_gradients_of_empty_experts_unwritten_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = F.grouped_mm

    def leaky(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        w.register_hook(lambda grad: grad.index_fill(0, torch.tensor(len(grad) - 1), torch.nan))
        return whole(x, w, offs=offs)

    assert grouping._try_grouped(torch.device("cpu"), torch.float32, DIM, HIDDEN)
    monkeypatch.setattr(grouping.F, "grouped_mm", leaky)
    assert not grouping._try_grouped(torch.device("cpu"), torch.float32, DIM, HIDDEN)


def test_equal_scores_choose_the_first_experts() -> None:
    layer = make()
    with torch.no_grad():
        layer.router.gate.weight.zero_()
    chosen = layer.route(inputs(), POSITIONS).chosen
    assert torch.equal(chosen, torch.arange(K).expand(ROWS, SEQ, K))


def test_order_by_expert() -> None:
    chosen = torch.tensor([2, 0, 2, 1, 0])
    order, counts = by_expert(chosen, 4)
    assert order.tolist() == [1, 4, 3, 0, 2]
    assert counts.tolist() == [2, 1, 2, 0]
    assert back(chosen[order], order).tolist() == chosen.tolist()
    weights = torch.tensor([[1.0, 2.0]])
    assert combine(torch.tensor([[10.0], [3.0]]), torch.tensor([1, 0]), weights).tolist() == [[[23.0]]]


def test_gradients_of_a_tokens_copies_are_added_up_at_once() -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16, requires_grad=True)
    order, _ = by_expert(torch.tensor([2, 1, 0, 0, 2, 1]), 3)
    out = routed(x, order, 3)
    assert out.flatten().tolist() == [1, 2, 1, 2, 1, 2]
    grad = torch.tensor([256.0, 1, 1, 256, 1, 1], dtype=torch.bfloat16)  # one by one, each 1 is lost beside 256
    out.backward(grad[:, None])
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [258, 258]


def shares(valid: Tensor, of: int) -> Tensor:
    return valid / of


def balance_by_definition(layer: MoE, x: Tensor, valid: Tensor, total: int) -> Tensor:
    """Σ_r (T_r / total) Σ_e f_e P_e, by loops."""
    loss, shape = torch.zeros(()), layer.shape
    scores = layer.router(x)
    probabilities = scores / scores.sum(-1, keepdim=True) if shape.score == "sigmoid" else scores
    for row in range(ROWS):
        mine = [t for t in range(SEQ) if valid[row, t]]
        chosen = [choices(layer, scores[row, t]) for t in mine]
        for expert in range(shape.count):
            count = sum(expert in of_token for of_token in chosen)
            mean = torch.stack([probabilities[row, t, expert] for t in mine]).mean() if mine else torch.zeros(())
            share = len(mine) / total * shape.count / (shape.per_token * max(len(mine), 1))
            loss = loss + share * count * mean
    return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_balance_loss_has_the_gradient_of_its_definition(variant: str) -> None:
    valid = torch.arange(SEQ) < torch.tensor([[7], [0], [3]])
    found = []
    for by_definition in (True, False):
        layer, x = make(balance_coefficient=0.0 if by_definition else 0.3, **VARIANTS[variant]), inputs()
        out, _ = layer(x, POSITIONS, shares(valid, 17))
        objective = (out * torch.linspace(0, 1, DIM)).sum()
        if by_definition:
            objective = objective + 0.3 * balance_by_definition(layer, x, valid, 17)
        objective.backward()
        found.append({name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad})
    for name, grad in found[0].items():
        assert grad is not None
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6 * float(1 + grad.abs().max()), msg=name)


def test_an_even_load_has_a_balance_loss_of_one() -> None:
    """What the value of L_r would be, from the gradient that is linear in the probabilities."""
    layer, x = make(balance_coefficient=1.0), inputs()
    counts = torch.tensor([[4] * EXPERTS + [2 * EXPERTS]] * ROWS)
    probabilities = torch.full((ROWS, 2 * EXPERTS, EXPERTS), 1 / EXPERTS, requires_grad=True)
    layer.balance(probabilities, counts, torch.full((ROWS, 2 * EXPERTS), 1 / (2 * EXPERTS))).backward(
        torch.zeros_like(probabilities)
    )
    assert probabilities.grad is not None
    assert (probabilities * probabilities.grad).sum((1, 2)).tolist() == pytest.approx([1.0] * ROWS)
    assert x.grad is None


def test_without_shares_there_is_no_balance_loss_and_nothing_is_counted() -> None:
    plain, balanced, x = make(), make(balance_coefficient=1.0, bias_rate=0.1), inputs()
    out, counts = balanced(x, POSITIONS)
    assert counts is None
    got = gradients(balanced, out, x)
    x = inputs()
    torch.testing.assert_close(got, gradients(plain, plain(x, POSITIONS)[0], x))


def test_the_bias_chooses_but_does_not_weigh() -> None:
    layer = make(bias_rate=0.1)
    assert layer.expert_bias is not None
    layer.expert_bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0, 3.0]))
    routes = layer.route(inputs(), POSITIONS)
    assert torch.equal(routes.chosen, torch.tensor([4, 2]).expand(ROWS, SEQ, K))
    torch.testing.assert_close(routes.scores, layer.router(inputs()))


def test_the_bias_moves_towards_an_even_load() -> None:
    layer = make(bias_rate=0.25)
    parts = [nn.ModuleList([make(), layer])]
    follower = SelectionBias(parts)
    for counts in ([1, 2, 3, 0, 0], [3, 0, 1, 2, 2]):  # two microbatches: 4, 2, 4, 2, 2 of a mean of 2.8
        layer.observe(torch.tensor(counts))
    follower.step()
    assert layer.expert_bias is not None
    assert layer.expert_bias.tolist() == [-0.25, 0.25, -0.25, 0.25, 0.25]
    follower.reset()
    follower.step()  # nothing was counted: nothing moves
    assert layer.expert_bias.tolist() == [-0.25, 0.25, -0.25, 0.25, 0.25]


def test_a_bias_without_a_rate_stays_as_it_was_loaded() -> None:
    layer, valid = make(**DEEPSEEK), torch.ones(ROWS, SEQ)
    assert layer.expert_bias is not None
    before = layer.expert_bias.clone()
    assert before.count_nonzero() == layer.n_experts
    layer.observe(layer(inputs(), POSITIONS, shares(valid, 21))[1])
    SelectionBias([layer]).step()
    assert torch.equal(layer.expert_bias, before)
    assert "expert_bias" in layer.state_dict()


def test_layers_may_differ() -> None:
    """In their number of experts, and in whether they have a bias that moves."""
    layers = [make(), make(bias_rate=0.5), make(**DEEPSEEK), make(**DEEPSEEK | Settings(bias_rate=0.25))]
    before = [None if layer.expert_bias is None else layer.expert_bias.clone() for layer in layers]
    layers[1].observe(torch.tensor([3, 1, 2, 2, 2]))
    layers[3].observe(torch.tensor([0, 0, 0, 8, 0, 0, 0, 0]))
    SelectionBias(layers).step()
    moved = [[-0.5, 0.5, 0, 0, 0], [0.0] * 8, [0.25, 0.25, 0.25, -0.25, 0.25, 0.25, 0.25, 0.25]]
    assert layers[0].expert_bias is None
    for layer, old, step in zip(layers[1:], before[1:], moved, strict=True):
        assert layer.expert_bias is not None
        assert old is not None
        assert torch.equal(layer.expert_bias, old + torch.tensor(step))


def test_only_tokens_with_labels_are_counted() -> None:
    layer, valid = make(bias_rate=0.1), torch.arange(SEQ) < torch.tensor([[7], [0], [3]])
    _, counts = layer(inputs(), POSITIONS, shares(valid, 10))
    chosen = layer.route(inputs(), POSITIONS).chosen[valid]
    assert counts is not None
    assert counts.tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()
    assert counts.sum() == 10 * K


def test_forced_balance_deals_experts_in_turn() -> None:
    layer = make(force_balance=True)
    assert layer.route(inputs(), POSITIONS + 3).chosen[0, :3].tolist() == [[1, 2], [3, 4], [0, 1]]


def test_bfloat16_stays_close() -> None:
    layer, x = make(), inputs()
    expected = layer(x, POSITIONS)[0]
    got = layer.to(torch.bfloat16)(x.to(torch.bfloat16), POSITIONS)[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.03 * expected.norm()


def test_sigmoids_are_taken_of_fp32() -> None:
    """bfloat16 would round logits, and let experts tie that do not."""
    layer, x = make(score="sigmoid", router_bias=True).to(torch.bfloat16), inputs().to(torch.bfloat16)
    gate = layer.router.gate
    exact = torch.sigmoid(x.float() @ gate.weight.float().T + gate.bias.float())
    torch.testing.assert_close(layer.router(x), exact, rtol=1e-6, atol=1e-6)
    assert layer(x, POSITIONS)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("variant", "extra"), [("deepseek v3", {"shared"}), ("gpt-oss", {"bias"})])
def test_every_parameter_is_counted_and_has_an_initial_value(variant: str, extra: set[str]) -> None:
    layer = make(**VARIANTS[variant])
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    assert sum(sizes.values()) == layer.shape.parameters(DIM)
    inits = layer.inits(Normal(0.02), Normal(0.01))
    assert inits.keys() == sizes.keys()
    zero = {name for name, init in inits.items() if init == Constant(0.0)}
    biases = {"router.gate.bias", "experts.b1", "experts.b2", "experts.b3"}
    assert zero == (biases if extra == {"bias"} else set())
    smaller = {name for name, init in inits.items() if init == Normal(0.01)}
    assert smaller == {"experts.w2"} | ({"shared.w2.weight"} if extra == {"shared"} else set())


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (Settings(per_token=9), ["per_token = 9: must be from 1 to the number of experts, 8"]),
        (Settings(groups=3), ["groups = 3: must divide the number of experts, 8"]),
        (Settings(groups=2, top_groups=3), ["top_groups = 3: must be from 1 to the number of groups, 2"]),
        (Settings(groups=4, per_token=3), ["per_token = 3: top_groups = 1, of 2 experts each, have only 2"]),
        (
            Settings(groups=8, top_groups=2),
            ['group_score = "top2": groups of one expert have no two scores to add up; take "max"'],
        ),
        (
            Settings(groups=0, per_token=0),
            [
                "per_token = 0: must be from 1 to the number of experts, 8",
                "top_groups = 1: must be from 1 to the number of groups, 0",
                "groups = 0: must divide the number of experts, 8",
            ],
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings: Settings, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ExpertsShape(**Settings(count=8, per_token=2, hidden=12) | settings)
    assert error.value.problems == tuple(f"ExpertsShape: {problem}" for problem in problems)


def test_names_are_titans() -> None:
    layer = make(bias_rate=0.1)
    assert {name for name, _ in layer.named_parameters()} == {
        "router.gate.weight",
        "experts.w1",
        "experts.w2",
        "experts.w3",
    }
    assert {*layer.state_dict()} - {name for name, _ in layer.named_parameters()} == {"expert_bias"}
    assert [*make().named_buffers()] == []
