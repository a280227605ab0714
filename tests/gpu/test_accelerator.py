"""What needs an accelerator: the same jobs as on a CPU, with numbers that agree. Run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from tests.trainer.runs import facts, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]
HALVES = "--training.mixed_precision_param=bfloat16"


def on(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, float]]:
    monkeypatch.setenv("ESPALIER_DEVICE", device)
    return [facts(record) for record in train(1, folder, "--data.document_mask", *arguments)]


def test_fp32_agrees_with_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    exact = ("--training.mixed_precision_param=float32",)
    here = on("cpu", tmp_path / "cpu", monkeypatch, *exact)
    there = on(kind.type, tmp_path / "gpu", monkeypatch, *exact)
    assert there == [pytest.approx(step, rel=1e-4) for step in here]


def test_bf16_and_compile_stay_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    exact = on("cpu", tmp_path / "cpu", monkeypatch, "--training.mixed_precision_param=float32")
    for name, arguments in {"eager": (HALVES,), "compiled": (HALVES, "--compile.enable")}.items():
        found = on(kind.type, tmp_path / name, monkeypatch, *arguments)
        assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in exact], rel=1e-2)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_resumed_run_repeats_itself_bit_for_bit(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    saving = ("--checkpoint.enable", "--checkpoint.interval=2", f"--checkpoint.async_mode={mode}")
    steady = ("--debug.deterministic", "--training.steps=4", *saving)
    whole = on(kind.type, tmp_path / "whole", monkeypatch, *steady)
    on(kind.type, tmp_path / "cut", monkeypatch, *steady, "--training.steps=2", "--lr_scheduler.total_steps=4")
    assert on(kind.type, tmp_path / "cut", monkeypatch, *steady, "--lr_scheduler.total_steps=4") == whole
