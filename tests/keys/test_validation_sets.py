"""Several validation sets: each has the loss that it has alone, and the whole is that of all their tokens."""

from pathlib import Path

import pytest

from tests.components.data.corpus import write_lines
from tests.keys.jobs import Done, run_jobs

VALIDATED = (
    "--validation.enable",
    "--validation.seq_len=16",
    "--validation.local_batch_size=2",
    "--validation.global_batch_size=4",
    "--validation.freq=2",
    "--training.steps=2",
)


@pytest.fixture(scope="module", params=[2])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("validation")
    write_lines(folder / "short.jsonl", ["a few words", "and a few more"])
    write_lines(folder / "long.jsonl", ["def long(): return 1\n" * 20, "x = 2\n" * 30])
    sets = {name: f'{{path = "{folder}/{name}.jsonl"}}' for name in ("short", "long")}
    jobs: dict[str, tuple[str, ...]] = {
        name: (*VALIDATED, f"--validation.sources=[{table}]") for name, table in sets.items()
    }
    jobs["both"] = (*VALIDATED, f"--validation.sources=[{', '.join(sets.values())}]", "--metrics.enable_tensorboard")
    write_lines(folder / "empty.jsonl", [""] * 3)
    alone = (*VALIDATED, "--data.add_bos=false")  # so that an empty document is an end token, which nothing predicts
    unknown = f'{{path = "{folder}/empty.jsonl"}}'
    jobs["unknown"] = (*alone, f"--validation.sources=[{unknown}]")
    jobs["one of two"] = (*alone, f"--validation.sources=[{unknown}, {sets['short']}]", "--metrics.enable_tensorboard")
    return run_jobs(folder, jobs, ranks=request.param)


@pytest.mark.shows("validation.sources")
def test_each_set_is_reported(done: dict[str, Done]) -> None:
    last = {name: job.steps[-1] for name, job in done.items()}
    losses = last["both"]["validation_losses"]
    assert losses == {name: last[name]["validation_loss"] for name in ("short", "long")}
    assert "validation_losses" not in last["short"]
    assert min(losses.values()) < last["both"]["validation_loss"] < max(losses.values())


def test_the_console_and_boards_name_them(done: dict[str, Done]) -> None:
    both = done["both"].steps[-1]
    shown = "".join(f"  {name} {loss:.5f}" for name, loss in both["validation_losses"].items())
    assert f"validation  step 2  loss {both['validation_loss']:.5f}{shown}\n" in done["both"].outcome.stdout
    events = b"".join(path.read_bytes() for path in (done["both"].folder / "tb").rglob("events*"))
    assert b"validation_loss/short" in events
    assert b"validation_loss/long" in events


UNKNOWN = (
    "validation set 'empty': no valid label token in what was read of it, so its loss is not known; raise"
    " validation.steps, or give other documents"
)


def test_a_set_without_labels_is_not_known_and_the_job_goes_on(done: dict[str, Done]) -> None:
    """Told once, in each pass as n/a, and null in the file."""
    job = done["unknown"]
    last = job.steps[-1]
    assert (last["step"], last["validation_loss"], last["validation_losses"]) == (2, None, {"empty": None})
    assert "validation  step 2  loss n/a  empty n/a\n" in job.outcome.stdout
    assert job.log.count(UNKNOWN) == 1


def check_one_of_two(job: Done) -> float:
    last = job.steps[-1]
    loss = last["validation_loss"]
    assert last["validation_losses"] == {"empty": None, "short": loss}
    assert f"validation  step 2  loss {loss:.5f}  empty n/a  short {loss:.5f}\n" in job.outcome.stdout
    assert job.log.count(UNKNOWN) == 1
    return loss


def test_a_set_without_labels_beside_one_with_some(done: dict[str, Done]) -> None:
    assert check_one_of_two(done["one of two"]) == pytest.approx(8.33, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipeline", "tensor", "context"])
def test_so_it_is_in_every_layout(done: dict[str, Done], kind: str, tmp_path: Path) -> None:
    folder = done["one of two"].folder.parent
    sets = ", ".join(f'{{path = "{folder}/{name}.jsonl"}}' for name in ("empty", "short"))
    other = ("--model.flavor=deep",) if kind == "tensor" else ()  # whose heads can be divided
    job = (*VALIDATED, "--data.add_bos=false", f"--validation.sources=[{sets}]", *other)
    done_so = run_jobs(tmp_path, {kind: (*job, f"--parallelism.{kind}_parallel_degree=2")}, ranks=2)[kind]
    loss = check_one_of_two(done_so)
    if not other:
        assert loss == pytest.approx(check_one_of_two(done["one of two"]), rel=1e-5)


def test_boards_leave_out_what_is_not_known(done: dict[str, Done]) -> None:
    events = b"".join(path.read_bytes() for path in (done["one of two"].folder / "tb").rglob("events*"))
    assert b"validation_loss/short" in events
    assert b"validation_loss/empty" not in events
