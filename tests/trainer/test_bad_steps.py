"""Bad steps: stopped at, skipped, or gone back from and passed over, on all ranks alike; every decision is recorded."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankError, run_ranks
from tests.trainer.runs import TINY, Outcome, call, meeting_point, records
from tests.trainer.test_resume import tensors
from trainer.bad_steps import Judge, Verdict

COMMON = (
    *TINY,
    "--experimental.custom_import=tests.trainer.broken_losses",
    "--training.local_batch_size=12",
    "--training.steps=8",
    "--lr_scheduler.total_steps=8",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
)
NAN, SPIKES = "--loss.name=faulty_nan", "--loss.name=faulty_spikes"
SKIP, ROLLBACK = "--training.on_nonfinite=skip", "--training.on_nonfinite=rollback"
SPIKE = "--training.spike_window=3"
EARLY = ("--training.max_norm=inf", "--optimizer.early_step_in_backward")
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=2")
SHARED = ("--training.local_batch_size=6", "--parallelism.data_parallel_shard_degree=2")


def in_turn(jobs: dict[str, list[str]], environ: dict[str, str]) -> dict[str, Outcome]:
    return {name: call(argv, environ) for name, argv in jobs.items()}


def run(folder: Path, jobs: Mapping[str, tuple[str, ...]], ranks: int = 1, **environ: str) -> dict[str, list[Outcome]]:
    """Jobs one after the other, each in a folder of its name; what each rank left of each."""
    argvs = {name: [*COMMON, f"--job.dump_folder={folder}/{name}", *job] for name, job in jobs.items()}
    if ranks == 1:
        (found,) = run_ranks(1, in_turn, argvs, meeting_point() | environ, backend=None, timeout=200)
        return {name: [outcome] for name, outcome in found.items()}
    each = {name: run_ranks(ranks, call, argv, meeting_point() | environ, backend=None) for name, argv in argvs.items()}
    return each  # one at a time: ranks that meet again at the same port may meet the store of the job before


def events(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds besides steps and saves."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event", "saved") != "saved"]


def short(folder: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events(folder)]


def same_weights(a: Path, b: Path, step: int) -> bool:
    """Whether two checkpoints hold the same in model, optimizer and generators, bit for bit."""
    first, second = tensors(a, step), tensors(b, step)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def losses(folder: Path) -> dict[int, float]:
    found = records(folder)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))  # each once, in order
    return {record["step"]: record["loss"] for record in found if record["loss"] is not None}


def without(values: dict[int, float], *steps: int) -> dict[int, float]:
    return {step: value for step, value in values.items() if step not in steps}


def test_the_judge_at_its_bounds() -> None:
    judge = Judge(window=3, loss_factor=1.5, norm_factor=10.0)
    recent = [[9.0, 9.0], [4.0, 1.0], [2.0, 3.0], [1.0, 2.0]]  # the last three count
    assert judge.judge(3.0, 20.0, recent) == Verdict("ok", 3.0, 20.0, 2.0, 2.0)
    assert judge.judge(math.nextafter(3.0, 4), 1.0, recent).kind == "spike"
    assert judge.judge(1.0, math.nextafter(20.0, 21), recent).kind == "spike"
    assert judge.judge(1e9, 1e9, recent[:2]) == Verdict("ok", 1e9, 1e9)  # the window is not full
    assert judge.judge(math.nan, 1.0, []).kind == judge.judge(1.0, math.inf, recent).kind == "nonfinite"
    assert judge.judge(5.0, 0.0, [[-1.0, 0.0]] * 3).kind == "ok"  # no factor of what is not positive
    assert Judge(4, 1.5, 10.0).judge(4.51, 1.0, recent).kind == "spike"  # the median of four is (2 + 4) / 2
    assert Judge(4, 1.5, 10.0).judge(4.5, 1.0, recent).kind == "ok"


def test_the_history_is_no_longer_than_the_window_and_empty_without_one() -> None:
    assert Judge(2, 1.5, 10.0).remember(3.0, 0.5, [[1.0, 1.0], [2.0, 1.0]]) == [[2.0, 1.0], [3.0, 0.5]]
    assert Judge(0, 1.5, 10.0).remember(3.0, 0.5, [[1.0, 1.0]]) == []
    assert Judge(0, 1.5, 10.0).judge(1e9, 1e9, [[1.0, 1.0]]).kind == "ok"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Step → what FAULTS calls its rows."""
    folder = tmp_path_factory.mktemp("rows")
    run(folder, {"all": ("--loss.name=faulty_none", "--training.steps=12")}, ROWS=str(folder / "rows"))
    lines = (folder / "rows").read_text().splitlines()
    found = {step: line.split() for step, line in enumerate(lines, 1)}
    names = [name for line in found.values() for name in line]
    assert len(lines) == 12
    assert len({*names}) == len(names) == 144
    return found


def bad(rows: dict[int, list[str]], steps: Iterable[int], **fault: object) -> dict[str, dict[str, object]]:
    """One row of each of these steps gets a fault."""
    return {rows[step][7]: fault for step in steps}


@pytest.fixture(scope="module")
def faults(rows: dict[int, list[str]]) -> str:
    cases = {
        "nan": bad(rows, [5], factor="nan"),
        "spikes": bad(rows, [5, 6], factor="60"),
        "many": bad(rows, range(2, 13), factor="nan"),
    }
    return json.dumps(cases)


JOBS = {
    "skip": (NAN, SKIP),
    "rollback": (NAN, ROLLBACK),
    "accumulated": (NAN, ROLLBACK, "--training.local_batch_size=4"),
    "accumulated skip": (NAN, SKIP, "--training.local_batch_size=4"),
    "workers": (NAN, ROLLBACK, "--training.dataloader.num_workers=2"),
    "background": (NAN, ROLLBACK, "--checkpoint.async_mode=async"),
    "early": (NAN, ROLLBACK, *EARLY),
    "early skip": (NAN, SKIP, EARLY[0]),
    "early none yet": (NAN, ROLLBACK, *EARLY, "--checkpoint.interval=500"),
    "none yet": (NAN, ROLLBACK, "--checkpoint.interval=500"),
    "spike skip": (SPIKES, "--training.on_spike=skip", SPIKE),
    "spike rollback": (SPIKES, "--training.on_spike=rollback", SPIKE),
    "spike stop": (SPIKES, "--training.on_spike=stop", SPIKE),
    "many": (
        "--loss.name=faulty_many",
        ROLLBACK,
        "--checkpoint.interval=500",
        "--checkpoint.enable_first_step_checkpoint",
        "--training.steps=12",
        "--lr_scheduler.total_steps=12",
    ),
}


@pytest.fixture(scope="module")
def done(faults: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("jobs")
    return folder, {name: outcome for name, (outcome,) in run(folder, JOBS, FAULTS=faults).items()}


def test_going_back_ends_as_skipping_does(done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = done
    assert outcomes["rollback"].code == 0, outcomes["rollback"].stderr
    skipped, back = folder / "skip", folder / "rollback"
    assert short(skipped) == [("skipped_step", 5)]
    assert short(back) == [("rolled_back", 5), ("passed_over", 5)]
    rolled = events(back)[0]
    assert (rolled["kind"], rolled["policy"], rolled["to_step"]) == ("nonfinite", "rollback", 4)
    assert (rolled["loss"], rolled["nonfinite"]["loss"]) == (None, "nan")
    assert "step 5: loss nan, gradient norm nan (rank 0: loss, gradient of " in rolled["reason"]
    assert (
        "going back to step-4, the batch of step 5 will be passed over: step 5: loss nan" in outcomes["rollback"].stderr
    )
    assert "step 5: its batch is passed over, weights are unchanged\n" in outcomes["rollback"].stderr
    assert losses(back) == losses(skipped)
    assert [*losses(back)] == [1, 2, 3, 4, 6, 7, 8]
    assert [r["tokens"] for r in records(back)] == [r["tokens"] for r in records(skipped)]
    assert all(same_weights(back, skipped, step) for step in (2, 4, 6, 8))
    four, six = tensors(back, 4), tensors(back, 6)
    assert not all(four[name].equal(six[name]) for name in four)


@pytest.mark.parametrize("name", ["accumulated", "workers", "background", "early"])
def test_going_back_however_it_runs(name: str, done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = done
    assert outcomes[name].code == 0, outcomes[name].stderr
    same = folder / ("skip" if name in ("workers", "background") else f"{name} skip")
    assert short(folder / name) == [("rolled_back", 5), ("passed_over", 5)]
    assert losses(folder / name) == losses(same)
    assert same_weights(folder / name, same, 8)


def test_without_a_checkpoint_yet_the_step_is_skipped(done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = done
    (event,) = events(folder / "none yet")
    assert (event["event"], event["step"], event["policy"]) == ("skipped_step", 5, "rollback")
    assert event["reason"].startswith("no checkpoint to go back to yet: step 5: loss nan")
    assert "no checkpoint to go back to yet: skipped, weights are unchanged: step 5" in outcomes["none yet"].stderr
    assert losses(folder / "none yet") == losses(folder / "skip")
    assert same_weights(folder / "none yet", folder / "skip", 8)


def test_weights_that_have_moved_are_not_kept_without_a_checkpoint(done: tuple[Path, dict[str, Outcome]]) -> None:
    outcome = done[1]["early none yet"]
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith(
        "error: not finite but weights have moved (optimizer.early_step_in_backward): go back to a checkpoint: step 5:"
    )
    assert outcome.stderr.endswith("; there is no checkpoint yet\n")


def test_spikes_are_found_against_accepted_steps_only(done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, _ = done
    skipped, back = folder / "spike skip", folder / "spike rollback"
    assert short(skipped) == [("skipped_step", 5), ("skipped_step", 6)]
    assert short(back) == [("rolled_back", 5), ("rolled_back", 6), ("passed_over", 5), ("passed_over", 6)]
    assert [event["to_step"] for event in events(back)[:2]] == [4, 4]
    usual = sorted(record["loss"] for record in records(back)[1:4])[1]
    found = events(skipped)
    assert [event["median_loss"] for event in (*found, *events(back)[:2])] == [usual] * 4
    assert [event["loss"] for event in found] == [event["loss"] for event in events(back)[:2]]
    assert all(event["kind"] == "spike" and event["loss"] > 3 * usual for event in found)
    assert without(losses(skipped), 5, 6) == losses(back)
    assert same_weights(back, skipped, 8)


def test_a_spike_stops_before_the_step(done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = done
    (event,) = events(folder / "spike stop")
    outcome, loss, usual = outcomes["spike stop"], event["loss"], event["median_loss"]
    assert outcome.code == 1
    assert event["event"] == "stopped_bad_step"
    assert outcome.stderr.splitlines()[-1].startswith(
        f"error: spike before the optimizer step, weights are unchanged: step 5: loss {loss} is above 1.5 × {usual}"
    )
    assert ", the median of the last 3 accepted steps (largest sums of losses: " in outcome.stderr
    assert [*losses(folder / "spike stop")] == [1, 2, 3, 4]


def test_a_job_does_not_go_back_to_one_checkpoint_for_ever(done: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = done
    assert outcomes["many"].code == 1
    assert outcomes["many"].stderr.splitlines()[-1].startswith("error: not finite before the optimizer step")
    assert outcomes["many"].stderr.endswith("; the job has gone back to step-1 10 times already\n")
    assert [event for event, _ in short(folder / "many")] == (
        ["rolled_back"] * 10 + ["passed_over"] * 10 + ["stopped_bad_step"]
    )


def test_a_kill_after_going_back_does_not_forget_what_is_passed_over(
    rows: dict[int, list[str]], done: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    """The step is bad only once, as from a bad memory cell; the job is killed as it comes to the step before again."""
    once = bad(rows, [6], factor="nan", once=str(tmp_path / "once")) | bad(rows, [5], kill=str(tmp_path / "once"))
    job = {"run": ("--loss.name=faulty_once", ROLLBACK)}
    environ = {"FAULTS": json.dumps({"once": once, "nan": bad(rows, [6], factor="nan")})}
    with pytest.raises(RankError, match="ended with exit code -9"):
        run(tmp_path, job, **environ)
    assert short(tmp_path / "run") == [("rolled_back", 6)]
    assert [*losses(tmp_path / "run")] == [1, 2, 3, 4]  # what came after is void
    (tmp_path / "once").touch()
    no_kill = {"FAULTS": json.dumps({"once": bad(rows, [6], factor="nan", once=str(tmp_path / "once"))})}
    ((outcome,),) = run(tmp_path, job, **no_kill).values()
    assert outcome.code == 0, outcome.stderr
    assert short(tmp_path / "run") == [("rolled_back", 6), ("resume", 4), ("passed_over", 6)]
    run(tmp_path, {"straight": (NAN, SKIP)}, **environ)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_weights(tmp_path / "run", tmp_path / "straight", 8)
    state = json.loads((tmp_path / "run/checkpoint/step-8/state.json").read_text())
    assert state["train_state"]["passed_over"] == [6]


def test_a_resumed_job_judges_as_if_it_had_not_been_cut_off(rows: dict[int, list[str]], tmp_path: Path) -> None:
    """The window of step 6 reaches behind the checkpoint of step 4."""
    spiking = ("--loss.name=faulty_spikes", "--training.on_spike=skip", SPIKE)
    whole = {"whole": spiking, "first": (*spiking, "--training.steps=4")}
    environ = {"FAULTS": json.dumps({"spikes": bad(rows, [6], factor="60")})}
    run(tmp_path, whole, **environ)
    state = json.loads((tmp_path / "first/checkpoint/step-4/state.json").read_text())
    first = records(tmp_path / "first")
    assert state["train_state"]["recent"] == [[record["loss"], record["grad_norm"]] for record in first[1:]]
    run(tmp_path, {"first": spiking}, **environ)
    resumed, straight = events(tmp_path / "first"), events(tmp_path / "whole")
    assert [event for event in resumed if event["event"] != "resume"] == straight
    assert short(tmp_path / "whole") == [("skipped_step", 6)]
    assert same_weights(tmp_path / "first", tmp_path / "whole", 8)


def test_two_ranks_go_back_together(faults: str, tmp_path: Path) -> None:
    jobs = {"skip": (NAN, SKIP, *SHARED), "rollback": (NAN, ROLLBACK, *SHARED)}
    outcomes = run(tmp_path, jobs, ranks=2, FAULTS=faults)
    assert [outcome.code for outcome in outcomes["rollback"]] == [0, 0], outcomes["rollback"][0].stderr
    assert short(tmp_path / "rollback") == [("rolled_back", 5), ("passed_over", 5)]
    assert "rank 1: loss" in events(tmp_path / "rollback")[0]["reason"]  # the row is one of its own
    assert "passed over" not in outcomes["rollback"][1].stderr
    assert losses(tmp_path / "rollback") == losses(tmp_path / "skip")
    assert same_weights(tmp_path / "rollback", tmp_path / "skip", 8)


@pytest.mark.slow
def test_the_stages_of_a_pipeline_go_back_together(faults: str, tmp_path: Path) -> None:
    spiking = (SPIKES, SPIKE, *PIPELINE)
    jobs = {name: (*spiking, f"--training.on_spike={name}") for name in ("skip", "rollback")}
    outcomes = run(tmp_path, jobs, ranks=2, FAULTS=faults)
    assert [outcome.code for outcome in outcomes["rollback"]] == [0, 0], outcomes["rollback"][0].stderr
    back = [("rolled_back", 5), ("rolled_back", 6), ("passed_over", 5), ("passed_over", 6)]
    assert short(tmp_path / "rollback") == back
    assert losses(tmp_path / "rollback") == without(losses(tmp_path / "skip"), 5, 6)
    assert same_weights(tmp_path / "rollback", tmp_path / "skip", 8)
