import pytest
import torch
from torch import nn

from components.checkpoint.state import model_tensors, of_model, optimizer_tensors, without
from components.runtime.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.norm = nn.BatchNorm1d(2)
        self.output = nn.Linear(2, 4, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_parameters_and_persistent_buffers_under_canonical_names() -> None:
    model = Tied()
    named = model_tensors([model])
    assert list(named) == [
        "model.embedding.weight",
        "model.norm.weight",
        "model.norm.bias",
        "model.norm.running_mean",
        "model.norm.running_var",
        "model.norm.num_batches_tracked",
    ]
    assert named["model.embedding.weight"] is model.output.weight


def test_model_parts_are_one_model() -> None:
    parts = nn.ModuleDict({"0": nn.Linear(1, 1)}), nn.ModuleDict({"1": nn.Linear(1, 1)})
    assert list(model_tensors(parts)) == ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]
    with pytest.raises(CheckpointError) as caught:
        model_tensors([parts[0], nn.ModuleDict({"0": nn.Linear(1, 1)})])
    assert str(caught.value) == "model.0.weight is in two model parts: names must be those of the whole model"


def test_state_that_is_no_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(CheckpointError) as caught:
        model_tensors([Odd()])
    assert str(caught.value) == "model._extra_state is a int: a module's state must be tensors"


def test_parts() -> None:
    named = {"model.w": torch.ones(2), "model.n": torch.tensor(3), **optimizer_tensors({"w.exp_avg": torch.zeros(2)})}
    assert list(named) == ["model.w", "model.n", "optimizer.w.exp_avg"]
    assert list(without(named, ["model"])) == ["optimizer.w.exp_avg"]
    assert list(of_model(named)) == ["model.w", "model.n"]
