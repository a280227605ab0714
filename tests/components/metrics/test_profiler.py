import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.job import Profiling
from components.metrics.profiler import Profiler
from components.runtime.errors import ConfigError

CPU = torch.device("cpu")


def _written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_traces(tmp_path: Path) -> None:
    config = Profiling(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=1)
    with Profiler(config, tmp_path, rank=3, device=CPU, start_step=20) as profiler:
        for _ in range(9):
            torch.ones(4, 5) @ torch.ones(5, 6)
            profiler.step()
    names = ["profile_traces/iteration_24/rank3_trace.json", "profile_traces/iteration_28/rank3_trace.json"]
    assert _written(tmp_path) == names
    events = json.loads((tmp_path / names[0]).read_text())["traceEvents"]
    assert [event["args"]["Input Dims"][:2] for event in events if event["name"] == "aten::matmul"] == [
        [[4, 5], [5, 6]]
    ]


def test_nothing_enabled_writes_nothing(tmp_path: Path) -> None:
    with Profiler(Profiling(), tmp_path, 0, CPU) as profiler:
        profiler.step()
    assert _written(tmp_path) == []


def test_what_cannot_be_done(tmp_path: Path) -> None:
    config = Profiling(enable_profiling=True, profile_freq=3, enable_memory_snapshot=True)
    with pytest.raises(ConfigError) as caught:
        Profiler(config, tmp_path, 0, CPU)
    assert caught.value.problems == (
        "profiling.profile_freq = 3: less than profiler_warmup + profiler_active = 4; allowed: 4 or more",
        "profiling.enable_memory_snapshot = true: the device is cpu, which has no allocator to take snapshots of;"
        " run on CUDA, or set it to false",
    )


def _snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: BaseException | None) -> list[Any]:
    recording: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kw: recording.append(kw))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("x"))
    config = Profiling(enable_memory_snapshot=True, profile_freq=2)
    with Profiler(config, tmp_path, 1, torch.device("cuda", 0)) as profiler:
        for _ in range(3):
            profiler.step()
        if fail:
            raise fail
    return recording


def test_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _snapshots(tmp_path, monkeypatch, None) == [{"max_entries": 100_000}, {"enabled": None}]
    assert _written(tmp_path) == ["memory_snapshot/iteration_2/rank1_memory_snapshot.pickle"]


def test_snapshot_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _snapshots(tmp_path, monkeypatch, torch.OutOfMemoryError("out"))
    assert _written(tmp_path)[1] == "memory_snapshot/iteration_4_out_of_memory/rank1_memory_snapshot.pickle"


def test_optional_packages_are_not_imported() -> None:
    code = (
        "import sys, components.metrics.sinks, components.metrics.meter, components.metrics.profiler;"
        "print([name for name in ('rich', 'tensorboard', 'wandb', 'torch.utils.tensorboard') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("module", ["optim.names", "loss.names", "metrics.step", "runtime.world", "runtime.logging"])
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, components.{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
