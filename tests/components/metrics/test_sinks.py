import io
import json
import logging
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from components.config.job import Job, Metrics
from components.config.job_config import JobConfig
from components.config.training import Training
from components.metrics.boards import TensorBoardSink
from components.metrics.console import PipeSink, TerminalSink, console_sink
from components.metrics.jsonl import JsonlSink
from components.metrics.sinks import Sinks, build_sinks
from components.metrics.step import StepMetrics
from components.runtime.errors import ConfigError, UserError
from components.runtime.logging import logger
from components.runtime.world import World

STEP = StepMetrics(
    step=10,
    loss=4.123456,
    max_loss=5.5,
    grad_norm=1.25,
    lr=8e-4,
    tokens=20480,
    tokens_per_second=12345.6,
    tflops=0.4567,
    mfu=None,
    memory_gib=0.806,
    data_wait=0.0123,
    seconds=0.5,
    memory_share=0.051,
)
LINE = (
    "step  10  loss  4.12346  max_loss  5.50000  grad_norm   1.2500  lr 8.00e-04  tokens/s    12346  tflops   0.457"
    "  mfu n/a  memory   0.81 GiB ( 5%)  data 1.2%"
)


@pytest.fixture(autouse=True)
def _messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    monkeypatch.setattr(logger, "level", level)
    logger.setLevel(logging.INFO)


def _entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pipe_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sink = PipeSink(total_steps=100)
    sink.advance(9)
    sink.log(STEP)
    sink.note({"event": "skip", "step": 10})
    sink.log(replace(STEP, step=50, mfu=0.4123, memory_share=None, validation_loss=3.2))
    sink.close()
    assert capsys.readouterr().out.splitlines() == [
        LINE,
        LINE.replace("step  10", "step  50").replace("n/a", "41.2%").replace(" ( 5%)", ""),
        "validation  step 50  loss 3.20000",
    ]


def test_pipe_line_of_a_bad_step(capsys: pytest.CaptureFixture[str]) -> None:
    PipeSink(100).log(replace(STEP, loss=math.nan, grad_norm=math.inf))
    assert capsys.readouterr().out == LINE.replace(" 4.12346", "     nan").replace("1.2500", "   inf") + "\n"


def test_what_was_not_computed_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    passed_over = replace(STEP, loss=None, max_loss=None, grad_norm=None)
    PipeSink(100).log(passed_over)
    told = LINE.replace(" 4.12346", "     n/a").replace(" 5.50000", "     n/a").replace("  1.2500", "     n/a")
    assert capsys.readouterr().out == told + "\n"
    record = json.loads(passed_over.to_json())
    assert [record[key] for key in ("loss", "max_loss", "grad_norm")] == [None] * 3
    assert "nonfinite" not in record


def test_a_validation_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    PipeSink(100).log(replace(STEP, validation_losses={"a": None}))
    PipeSink(100).log(replace(STEP, validation_loss=3.2, validation_losses={"a": None, "b": 3.2}))
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("validation")]
    assert told == ["validation  step 10  loss n/a  a n/a", "validation  step 10  loss 3.20000  a n/a  b 3.20000"]


def test_stdout_that_is_no_terminal_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(console_sink(100, 0, plain=False), PipeSink)


def _terminal(**settings: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200, highlight=False, **settings)
    sink = TerminalSink(100, 4, console)
    sink.advance(9)
    sink.log(replace(STEP, validation_loss=3.2))
    sink.close()
    return stream.getvalue()


def _plain(text: str) -> list[str]:
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()]


def test_terminal_has_the_same_lines_and_a_bar_below() -> None:
    shown = _plain(_terminal(color_system="truecolor", no_color=False))
    assert shown.count(LINE) == 1
    assert shown.count("validation  step 10  loss 3.20000") == 1
    bars = [line for line in shown if "steps ·" in line]
    assert "4/100 steps · loss … · … tokens/s ·" in bars[0]
    assert " 10/100 steps · loss 4.1235 · 12346 tokens/s · 0:00:00 · ETA " in bars[-1]
    assert shown.index(LINE) < len(shown) - 1 - shown[::-1].index(bars[-1])


def test_no_colours_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(text: str) -> bool:
        return any(f"\x1b[{code}" in text for code in ("38;", "32m", "31m"))

    assert colours(_terminal(color_system="truecolor", no_color=False))
    assert not colours(_terminal(color_system="truecolor", no_color=True))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("plain", "variable", "off"), [(False, "", False), (True, "", True), (False, "1", True)])
@pytest.mark.shows("metrics.disable_color_printing")
def test_terminal_is_found(plain: bool, variable: str, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", variable)
    sink = console_sink(100, 0, plain=plain)
    sink.close()
    assert isinstance(sink, TerminalSink)
    assert sink._console.no_color == off
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console_sink(100, 0, plain=False), PipeSink)


def test_jsonl_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, None)
    sink.log(STEP)
    sink.note({"event": "skip", "step": 11, "loss": math.nan})
    assert _entries(path) == [
        {
            "step": 10, "loss": 4.123456, "max_loss": 5.5, "grad_norm": 1.25, "lr": 8e-4, "tokens": 20480,
            "tokens_per_second": 12345.6, "tflops": 0.4567, "mfu": None, "memory_gib": 0.806, "data_wait": 0.0123,
            "seconds": 0.5, "memory_share": 0.051,
        },
        {"event": "skip", "step": 11, "loss": None, "nonfinite": {"loss": "nan"}},
    ]  # fmt: skip
    sink.log(replace(STEP, step=20, validation_loss=3.0))
    assert _entries(path)[2]["validation_loss"] == 3.0
    sink.close()


def test_resume_drops_what_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"event": "resume", "step": 40}\n{"event": "skip", "step": 5}\n{"event": "x"}\n{"step": 2}\n'
        '{"event": "skip", "step": 2}\n{"step": 3}\n{"step": 4, "lo'
    )
    sink = JsonlSink(path, 2)
    sink.log(replace(STEP, step=3))
    sink.close()
    assert [(entry.get("event"), entry.get("step")) for entry in _entries(path)] == [
        (None, 1), ("resume", 40), ("x", None), (None, 2), ("skip", 2), ("resume", 2), (None, 3),
    ]  # fmt: skip
    assert caplog.messages == [f"{path}:8: not a whole line of JSON, dropped"]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_without_a_file(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl", 7).close()
    assert _entries(tmp_path / "metrics.jsonl") == [{"event": "resume", "step": 7}]


def test_new_run_moves_the_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        sink = JsonlSink(path, None)
        sink.log(replace(STEP, step=step))
        sink.close()
    found = {file.name: [entry["step"] for entry in _entries(file)] for file in tmp_path.iterdir()}
    assert found == {"metrics.jsonl": [3], "metrics.1.jsonl": [1], "metrics.2.jsonl": [2]}


def test_jsonl_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        JsonlSink(tmp_path / "no" / "metrics.jsonl", None)
    assert str(caught.value) == (
        f"{tmp_path}/no/metrics.jsonl: cannot write metrics there: No such file or directory; move it away, or choose"
        " another job.dump_folder"
    )


def _job(**metrics: Any) -> JobConfig:
    return JobConfig(job=Job(description="a try"), training=Training(steps=100), metrics=Metrics(**metrics))


def _kinds(sinks: Sinks) -> list[str]:
    sinks.close()
    return [type(sink).__name__ for sink in sinks.sinks]


@pytest.mark.shows("metrics.save_for_all_ranks")
def test_who_writes_what(tmp_path: Path) -> None:
    first, second = World(0, 0, 2), World(1, 1, 2)
    logger.setLevel(logging.INFO)
    assert _kinds(build_sinks(_job(), first, tmp_path, None)) == ["JsonlSink", "PipeSink"]
    assert _kinds(build_sinks(_job(), second, tmp_path, None)) == ["PipeSink"]  # it is one of LOG_RANK
    logger.setLevel(logging.WARNING)
    both = {"enable_tensorboard": True}
    assert _kinds(build_sinks(_job(**both), first, tmp_path, None)) == ["JsonlSink", "TensorBoardSink"]
    assert _kinds(build_sinks(_job(**both), second, tmp_path, None)) == []
    everyone = {**both, "save_for_all_ranks": True}
    assert _kinds(build_sinks(_job(**everyone), second, tmp_path, None)) == ["TensorBoardSink"]
    assert [file.name for file in (tmp_path / "tb").iterdir() if file.is_dir()] == ["rank_1"]


def test_fan_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with build_sinks(_job(), World(0, 0, 1), tmp_path, None) as sinks:
        sinks.log(STEP)
        sinks.note({"event": "skip", "step": 11})
        sinks.advance(11)
    assert capsys.readouterr().out == LINE + "\n"
    assert [entry["step"] for entry in _entries(tmp_path / "metrics.jsonl")] == [10, 11]


def _read(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_what_comes_after_the_end_is_dropped(tmp_path: Path) -> None:
    """A stop closes the reports while the training thread is about to write one."""
    sinks = Sinks([JsonlSink(tmp_path / "metrics.jsonl", None)])
    sinks.note({"event": "stopped", "step": 3})
    sinks.close()
    sinks.note({"event": "late", "step": 4})
    sinks.advance(4)
    sinks.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "stopped", "step": 3}\n'


def test_tensorboard_drops_what_is_run_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, None)
    for step in (1, 2, 3):
        first.log(replace(STEP, step=step, loss=float(step), validation_loss=7.0 if step == 2 else None))
    first.close()
    assert _read(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert _read(tmp_path, "validation_loss") == [(2, 7.0)]
    second = TensorBoardSink(tmp_path, 2)
    second.log(replace(STEP, step=3, loss=0.5))
    second.close()
    assert _read(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 0.5)]


def test_going_back_drops_what_is_run_again_and_keeps_that_it_was(tmp_path: Path) -> None:
    lines, board = JsonlSink(tmp_path / "metrics.jsonl", None), TensorBoardSink(tmp_path / "tb", None)
    for step in (1, 2, 3):
        lines.log(replace(STEP, step=step))
        board.log(replace(STEP, step=step, loss=float(step)))
    lines.note({"event": "skipped_step", "step": 3})
    lines.note({"event": "rolled_back", "step": 4, "to_step": 2})
    lines.rewind(2)
    board.rewind(2)
    lines.log(replace(STEP, step=3))
    board.log(replace(STEP, step=3, loss=0.5))
    lines.close()
    board.close()
    found = [(entry.get("event"), entry["step"]) for entry in _entries(tmp_path / "metrics.jsonl")]
    assert found == [(None, 1), (None, 2), ("rolled_back", 4), (None, 3)]
    assert _read(tmp_path / "tb", "loss") == [(1, 1.0), (2, 2.0), (3, 0.5)]
    JsonlSink(tmp_path / "metrics.jsonl", 2).close()
    found = [(entry.get("event"), entry["step"]) for entry in _entries(tmp_path / "metrics.jsonl")]
    assert found == [(None, 1), (None, 2), ("rolled_back", 4), ("resume", 2)]


def test_all_are_closed_once_whatever_one_of_them_says(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail() -> None:
        calls.append("first")
        raise UserError("no room")

    first, second = (JsonlSink(tmp_path / f"{name}.jsonl", None) for name in "ab")
    closing = second.close
    setattr(first, "close", fail)  # noqa: B010  # in place of the class's
    setattr(second, "close", lambda: calls.append("second") or closing())  # noqa: B010
    sinks = Sinks([first, second])
    with pytest.raises(UserError, match="no room"):
        sinks.close()
    sinks.close()
    sinks.log(STEP)
    assert calls == ["first", "second"]
    JsonlSink.close(first)
    assert _entries(tmp_path / "b.jsonl") == []


@pytest.mark.shows("metrics.enable_wandb")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (step, values["loss"], "mfu" in values))),
        finish=lambda: calls.append(("finish", None)),
    )
    package: Any = types.ModuleType("wandb")
    package.init = lambda **kw: (
        calls.append(("init", (kw["project"], kw["notes"], kw["config"]["training"]["steps"]))) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    logger.setLevel(logging.WARNING)
    with build_sinks(_job(enable_wandb=True), World(0, 0, 1), tmp_path, None) as sinks:
        sinks.log(STEP)
    assert calls == [("init", ("espalier", "a try", 100)), ("log", (10, 4.123456, False)), ("finish", None)]


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        build_sinks(_job(enable_wandb=True), World(0, 0, 1), tmp_path, None)
    assert str(caught.value) == (
        "metrics.enable_wandb = true: the package wandb is not installed; install it with"
        " `pip install 'espalier[wandb]'`, or set it to false"
    )
