"""A seed checkpoint: the initial weights as step 0, from which a run of any layout starts."""

from pathlib import Path

import pytest
import torch

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from tests.keys.test_every_key import problems
from tests.trainer.runs import facts, launch, records, train

SAVING = ("--checkpoint.enable", "--checkpoint.interval=500")
SEED = (*SAVING, "--checkpoint.create_seed_checkpoint")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    train(1, folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a seed, read without knowing the model."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "checkpoint/step-0", folder / "all.pt")
    return torch.load(folder / "all.pt", weights_only=True)


@pytest.mark.shows("checkpoint.create_seed_checkpoint")
@pytest.mark.parametrize(("makers", "ranks"), [(1, 1), (1, 2), (2, 1)])
def test_a_run_from_a_seed_is_the_run_without_it(makers: int, ranks: int, fresh: Path, tmp_path: Path) -> None:
    made = launch(makers, tmp_path, *SEED)
    assert [outcome.code for outcome in made] == [0] * makers
    where = tmp_path / "checkpoint/step-0"
    assert made[0].stderr.splitlines()[-1] == (
        f"seed checkpoint: {where}; a run of this job without create_seed_checkpoint starts from it"
    )
    assert made[0].stdout == ""
    assert records(tmp_path) == []
    found = train(ranks, tmp_path, *SAVING)
    assert [record["step"] for record in found] == [1, 2, 3]
    assert [facts(record) for record in found] == [pytest.approx(facts(r), rel=1e-5) for r in records(fresh)]


def test_training_starts_from_the_weights_that_are_in_it(fresh: Path, tmp_path: Path) -> None:
    """Weights may be changed, and so may what a job does with them: only the model has to be the same."""
    launch(1, tmp_path / "made", *SEED)
    made = Checkpointer(tmp_path / "made/checkpoint", keep_latest_k=0, group=None)
    changed = {name: value * 1.5 for name, value in tensors(tmp_path / "made").items()}
    mine = Checkpointer(tmp_path / "mine/checkpoint", keep_latest_k=0, group=None)
    mine.prepare()
    mine.save_model(0, changed, JobIdentity(made.read_manifest(0).fingerprint), torch.float32)
    outcomes = launch(2, tmp_path / "mine", *SAVING, "--optimizer.lr=1e-30", "--debug.seed=8")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert "loaded step-0, all but dataloader, lr_scheduler, optimizer, rng, train_state\n" in outcomes[0].stderr
    assert records(tmp_path / "mine")[0]["loss"] != pytest.approx(records(fresh)[0]["loss"], rel=1e-3)
    saved = Checkpointer(tmp_path / "mine/checkpoint", keep_latest_k=0, group=None)
    held = {name: torch.empty_like(value) for name, value in changed.items()}
    state = saved.load(3, held, job=None, exclude=("optimizer", "lr_scheduler", "dataloader", "rng"))
    tokens = records(tmp_path / "mine")[-1]["tokens"]
    assert state == {"train_state": {"step": 3, "tokens": tokens, "recent": [], "passed_over": []}}
    assert all(torch.allclose(held[name], changed[name], rtol=1e-6, atol=0) for name in changed)
    (other,) = launch(1, tmp_path / "made", *SAVING, "--model.flavor=tied")
    assert other.code == 2
    assert 'checkpoint step-0 belongs to another job: model.flavor: "untied" saved, "tied" now;' in other.stderr


def test_a_seed_is_a_job_s_first_checkpoint(tmp_path: Path) -> None:
    train(1, tmp_path, *SAVING, "--training.steps=1")
    (outcome,) = launch(1, tmp_path, *SEED)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == (
        f"error: checkpoint.create_seed_checkpoint = true: '{tmp_path}/checkpoint' holds step-1 already, and a seed is"
        " the first: set it to false to go on from there, or start a new job.dump_folder"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing is saved while checkpoint.enable is false; set that to true"),
        (
            ("--checkpoint.enable", "--checkpoint.load_only"),
            "nothing is saved while checkpoint.load_only is true; set one of them to false",
        ),
        (
            ("--checkpoint.enable", "--checkpoint.initial_load_path=a/step-9"),
            'a seed holds fresh weights, not those of checkpoint.initial_load_path = "a/step-9"; leave one out',
        ),
        (
            ("--checkpoint.enable", "--checkpoint.load_step=4"),
            "nothing is loaded, but checkpoint.load_step is 4; leave one out",
        ),
    ],
)
def test_what_it_cannot_go_with(arguments: tuple[str, ...], message: str) -> None:
    assert problems(("--checkpoint.create_seed_checkpoint", *arguments)) == [
        f"checkpoint.create_seed_checkpoint = true: {message}"
    ]
