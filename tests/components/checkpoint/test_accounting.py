"""After loading nothing is missing, nothing was not expected, and nothing is left as it was: else the job stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from components.checkpoint import tensors as engine
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.state import model_tensors
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, STATE, reseal
from tests.ranks import run_ranks

Change = Callable[[dict[str, Any]], object]


def held(fill: float) -> dict[str, Tensor]:
    """Two tensors of 5 × 2, each cut by rows where there are ranks."""
    whole = {"model.w": torch.arange(10.0).view(5, 2) + fill, "optimizer.w.exp_avg": torch.full((5, 2), fill)}
    if not dist.is_initialized():
        return whole
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}


def checkpointer(root: str) -> Checkpointer:
    return Checkpointer(Path(root), keep_latest_k=0, group=dist.group.WORLD if dist.is_initialized() else None)


def write(root: str) -> None:
    checkpointer(root).save(1, held(1.0), STATE, JOB)


def attempt(root: str, like: dict[str, Any], unchecked: bool = False, exclude: tuple[str, ...] = ()) -> str:
    """What loading says; empty if it succeeds with every value."""
    if unchecked:
        setattr(engine, "_entry_problem", lambda *_: None)  # noqa: B010  # in a process of its own
    found = held(7.0)
    try:
        checkpointer(root).load(1, found, job=JOB, like=like, exclude=exclude)
    except CheckpointError as error:
        return str(error)
    assert all(torch.equal(local(found[name]), local(value)) for name, value in held(1.0).items())
    return ""


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two ranks: rows 0 to 2, and rows 3 and 4."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(2, write, str(root))
    return root


def forge(saved: Path, root: Path, name: str, change: Change) -> str:
    """A copy whose file `name` has been changed, with hashes that are right for it."""
    folder = root / "step-1"
    folder.mkdir()
    for path in (saved / "step-1").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_text(json.dumps(content))
    reseal(folder)
    return str(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("dataloader"), "missing in its state: dataloader"),
        (lambda s: s.clear(), "missing in its state: dataloader, lr_scheduler, train_state"),
        (lambda s: s["train_state"].pop("best"), "missing in its state: train_state.best"),
        (lambda s: s.update(more={}), "not expected in its state: more"),
        (lambda s: s["lr_scheduler"].update(warmup=3), "not expected in its state: lr_scheduler.warmup"),
        (lambda s: s["train_state"].update(step="1"), "train_state.step in its state: str saved, int here"),
        (lambda s: s["train_state"].update(step=True), "train_state.step in its state: bool saved, int here"),
        (
            lambda s: s.update(lr_scheduler=[3]),
            "missing in its state: lr_scheduler.last; lr_scheduler in its state: list saved, dict here",
        ),
    ],
)
def test_a_state_that_is_not_whole_is_refused(saved: Path, tmp_path: Path, change: Change, message: str) -> None:
    assert attempt(forge(saved, tmp_path, "state.json", change), STATE) == f"checkpoint step-1 does not fit: {message}"


def test_state_and_tensors_are_listed_at_once_and_alike_on_all_ranks(saved: Path, tmp_path: Path) -> None:
    root = forge(saved, tmp_path, "state.json", lambda state: state.pop("dataloader"))
    index = json.loads((tmp_path / "step-1/tensors.json").read_bytes())
    index["model.v"] = index.pop("optimizer.w.exp_avg")
    (tmp_path / "step-1/tensors.json").write_text(json.dumps(index))
    reseal(tmp_path / "step-1")
    text = (
        "checkpoint step-1 does not fit: missing in its state: dataloader; not expected here: model.v; missing in the"
        " checkpoint: optimizer.w.exp_avg"
    )
    assert run_ranks(2, attempt, root, STATE) == [text] * 2
    assert attempt(root, STATE, exclude=("optimizer", "dataloader")) == (
        "checkpoint step-1 does not fit: not expected here: model.v"
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_pieces_that_overlap_leave_a_hole(saved: Path, tmp_path: Path, ranks: int) -> None:
    """As many elements as the tensor has, all inside of it, and a row without any."""

    def shift(index: dict[str, Any]) -> None:
        first, second = sorted(index["model.w"]["pieces"], key=lambda piece: piece["offsets"])
        assert (first["sizes"], second["sizes"], second["offsets"]) == ([3, 2], [2, 2], [3, 0])
        second["offsets"] = [2, 0]

    root = forge(saved, tmp_path, "tensors.json", shift)
    refused = "checkpoint step-1: tensors.json: model.w is not filled exactly by its pieces"
    assert run_ranks(ranks, attempt, root, STATE) == [refused] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_read_is_counted(saved: Path, tmp_path: Path, ranks: int) -> None:
    """A second net, below the check of the index."""
    root = forge(saved, tmp_path, "tensors.json", lambda index: index["model.w"].update(pieces=last(index)))
    which = {1: "", 2: "rank 0: "}[ranks]  # which holds the first rows
    text = f"checkpoint step-1: {which}not filled by what was read: model.w"
    assert run_ranks(ranks, attempt, root, STATE, True) == [text] * ranks
    assert run_ranks(ranks, attempt, str(saved), STATE, True) == [""] * ranks


def last(index: dict[str, Any]) -> list[dict[str, Any]]:
    return [piece for piece in index["model.w"]["pieces"] if piece["offsets"] == [3, 0]]


def test_boxes_in_two_dimensions_that_touch_do_not_overlap() -> None:
    def entry(*pieces: tuple[int, int, int, int]) -> engine.TensorEntry:
        return engine.TensorEntry(
            "float32", [4, 4], [engine.Piece([r, c], [h, w], "f", 0, 4 * h * w) for r, c, h, w in pieces]
        )

    quarters = ((0, 0, 2, 2), (0, 2, 2, 2), (2, 0, 2, 2), (2, 2, 2, 2))
    assert engine._entry_problem(entry(*quarters), {"f": 99}, "w") is None
    assert engine._entry_problem(entry((0, 0, 4, 1), (0, 1, 1, 3), (1, 1, 3, 3)), {"f": 99}, "w") is None
    hole = entry((0, 0, 2, 2), (0, 2, 2, 2), (2, 0, 2, 2), (1, 1, 2, 2))
    assert engine._entry_problem(hole, {"f": 99}, "w") == "w is not filled exactly by its pieces"


class Forgetful(nn.Module):
    """Leaves one of its parameters and one of its buffers out of its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
        self.register_buffer("counts", torch.zeros(2))
        self.register_buffer("fleeting", torch.zeros(2), persistent=False)
        self.register_state_dict_post_hook(self.forget)

    @staticmethod
    def forget(_: nn.Module, state: dict[str, Tensor], *__: object) -> None:
        del state["scale"], state["counts"]


def test_a_parameter_that_is_not_saved_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        model_tensors([Forgetful()])
    assert str(caught.value) == "not in the model's state_dict, so that they could not be saved: counts, scale"
