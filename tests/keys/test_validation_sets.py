"""Several validation sets: each has the loss that it has alone, and the whole is that of all their tokens."""

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
