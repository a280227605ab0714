"""Recompute by memory budget: the smaller the budget, the less is kept, and gradients stay what they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.config.compute import ActivationCheckpoint, Compile
from components.parallel.compile import compile_blocks
from components.parallel.recompute import recompute
from components.runtime.errors import ConfigError
from tests.components.parallel.tiny import PLAN, batch, loss_sum, make
from tests.keys.test_every_key import problems

BUDGET = "--activation_checkpoint.mode=memory_budget"
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at hidden states'
KEY = 'activation_checkpoint.mode = "memory_budget"'


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Budgets and compiled code are the process's: leave neither behind."""
    torch.compiler.reset()
    yield
    recompute(make(), PLAN, ActivationCheckpoint(mode="none"))
    torch.compiler.reset()


def run(folder: Path, **settings: Any) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a compiled model keeps for backward, and its gradients."""
    torch.compiler.reset()
    model, kept = make(), 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.nbytes
        return value

    recompute(model, PLAN, ActivationCheckpoint(**settings), folder, compiled=True)
    compile_blocks(model, PLAN, Compile(enable=True, backend="aot_eager"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = loss_sum(model, *batch(2), chunked=False)
    loss.backward()
    return kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.shows("activation_checkpoint.memory_budget")
def test_a_smaller_budget_keeps_less_and_changes_no_gradient(tmp_path: Path) -> None:
    everything, want = run(tmp_path, mode="none")
    kept = {1.0: everything}
    for budget in (1.0, 0.5, 0.0):
        kept[budget], got = run(tmp_path, mode="memory_budget", memory_budget=budget)
        assert got.keys() == want.keys()
        assert len(got) == len(list(make().named_parameters()))
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
    assert everything == kept[1.0] > kept[0.5] > kept[0.0]
    assert run(tmp_path, mode="none")[0] == everything  # the budget of an earlier model is gone


@pytest.mark.shows("activation_checkpoint.visualize_memory_budget_pareto")
def test_other_budgets_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"mode": "memory_budget", "visualize_memory_budget_pareto": True}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, **settings)
    assert str(caught.value) == (
        "activation_checkpoint.visualize_memory_budget_pareto = true: drawing needs the package matplotlib: install it,"
        " or set this to false"
    )
    monkeypatch.undo()
    package = tmp_path / "packages/matplotlib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pyplot.py").write_text(
        "from pathlib import Path\n"
        "def __getattr__(name): return lambda *a, **k: None\n"
        "class Figure:\n"
        "    def savefig(self, name): Path(name).write_text('drawn')\n"
        "def gcf(): return Figure()\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    run(tmp_path, mode="memory_budget")
    assert not (tmp_path / "memory_budget_pareto").exists()
    run(tmp_path, **settings)
    drawings = [path.name for path in (tmp_path / "memory_budget_pareto").iterdir()]
    assert drawings
    assert all(name.startswith("memory_budget_pareto") and name.endswith(".svg") for name in drawings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), 'needs compiled blocks, but compile.enable is false; set that to true, or take "selective"'),
        (
            ("--compile.enable", '--compile.components=["loss"]'),
            'needs compiled blocks, but compile.components = ["loss"]; add "model" there, or take "selective"',
        ),
        (
            ("--compile.enable", "--compile.backend=eager"),
            'compile.backend = "eager" does not choose what is kept; take another one, such as "inductor"',
        ),
    ],
)
def test_it_needs_compiled_blocks(arguments: tuple[str, ...], message: str) -> None:
    assert problems((BUDGET, *arguments)) == [f"{KEY}: {message}"]
    assert problems((BUDGET, "--compile.enable")) == []
