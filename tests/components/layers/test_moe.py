"""The mixture-of-experts layer against a plain loop over tokens, the balance loss against its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.layers import moe
from components.layers.moe import Experts, MoE, SelectionBias, can_group
from components.layers.shapes import ExpertsShape
from components.mesh.experts import back, by_expert, combine, routed

DIM, HIDDEN, EXPERTS, K = 8, 12, 5, 2
ROWS, SEQ = 3, 7


def make(dim: int = DIM, hidden: int = HIDDEN, **settings: Any) -> MoE:
    layer = MoE(dim, ExpertsShape(EXPERTS, K, hidden, **dict[str, Any](balance_coefficient=0.0) | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def inputs(dim: int = DIM) -> Tensor:
    return torch.randn(ROWS, SEQ, dim, generator=torch.Generator().manual_seed(2), requires_grad=True)


POSITIONS = torch.arange(SEQ).expand(ROWS, SEQ)


def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    experts, tokens = layer.experts, []
    for token in x.flatten(0, 1):
        probabilities = (layer.router.gate.weight @ token).softmax(0)
        weights, chosen = probabilities.topk(K)
        weights = weights / weights.sum() if layer.shape.normalize else weights
        outs = [experts.w2[e] @ (F.silu(experts.w1[e] @ token) * (experts.w3[e] @ token)) for e in chosen]
        tokens.append(sum((w * out for w, out in zip(weights, outs, strict=True)), torch.zeros(x.shape[-1])))
    return torch.stack(tokens).view(x.shape)


def gradients(layer: MoE, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dim", "hidden", "grouped"), [(8, 12, True), (7, 9, False)])
def test_values_and_gradients(dim: int, hidden: int, grouped: bool, normalize: bool) -> None:
    assert can_group(torch.device("cpu"), torch.float32, dim, hidden) == grouped
    found: list[dict[str, Tensor]] = []
    compute: list[Callable[[MoE, Tensor], Tensor]] = [by_hand, lambda layer, x: layer(x, POSITIONS)[0]]
    for run in compute:
        layer, x = make(dim, hidden, normalize=normalize), inputs(dim)
        out = run(layer, x)
        found.append(gradients(layer, out, x) | {"out": out.detach()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("counts", [(0, 3, 0, 1, 0), (0, 0, 0, 0, 0), (4, 0, 0, 0, 0)])
def test_empty_experts_have_gradients_of_zero(dim: int, counts: tuple[int, ...]) -> None:
    experts = Experts(dim, ExpertsShape(EXPERTS, K, HIDDEN))
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
    layer, x = make(), inputs()
    expected = layer(x, POSITIONS)[0]
    monkeypatch.setattr(moe, "can_group", lambda *shape: False)
    torch.testing.assert_close(layer(x, POSITIONS)[0], expected)


def test_a_kernel_that_leaves_gradients_of_empty_experts_unwritten_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = F.grouped_mm

    def leaky(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        w.register_hook(lambda grad: grad.index_fill(0, torch.tensor(len(grad) - 1), torch.nan))
        return whole(x, w, offs=offs)

    assert moe._try_grouped(torch.device("cpu"), torch.float32, DIM, HIDDEN)
    monkeypatch.setattr(moe.F, "grouped_mm", leaky)
    assert not moe._try_grouped(torch.device("cpu"), torch.float32, DIM, HIDDEN)


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
    loss = torch.zeros(())
    probabilities = layer.router(x)
    chosen = probabilities.topk(K).indices
    for row in range(ROWS):
        length = int(valid[row].sum())
        for expert in range(EXPERTS):
            mine = [t for t in range(SEQ) if valid[row, t]]
            count = sum(int(expert in chosen[row, t]) for t in mine)
            mean = torch.stack([probabilities[row, t, expert] for t in mine]).mean() if mine else torch.zeros(())
            loss = loss + length / total * EXPERTS / (K * max(length, 1)) * count * mean
    return loss


@pytest.mark.parametrize("normalize", [True, False])
def test_the_balance_loss_has_the_gradient_of_its_definition(normalize: bool) -> None:
    valid = torch.arange(SEQ) < torch.tensor([[7], [0], [3]])
    found = []
    for by_definition in (True, False):
        layer, x = make(balance_coefficient=0.0 if by_definition else 0.3, normalize=normalize), inputs()
        out, _ = layer(x, POSITIONS, shares(valid, 17))
        objective = (out * torch.linspace(0, 1, DIM)).sum()
        if by_definition:
            objective = objective + 0.3 * balance_by_definition(layer, x, valid, 17)
        objective.backward()
        found.append({name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


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
    torch.testing.assert_close(routes.probabilities, layer.router(inputs()))


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
