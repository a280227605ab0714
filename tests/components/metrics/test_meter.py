import json
import math

import pytest
import torch
import torch.distributed as dist

from components.mesh.batch import RowLoss
from components.metrics.flops import peak_by_name, peak_flops
from components.metrics.memory import GIB, Memory, peak_memory
from components.metrics.meter import Meter, StepValues, largest_row_mean, reduce_step
from components.metrics.step import StepMetrics, Validated
from tests.ranks import run_ranks

CPU = torch.device("cpu")
VALUES = StepValues(2.0, 3.5, 0.25)


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _meter(clock: _Clock, peak: float | None = 4e12, tokens: int = 0) -> Meter:
    return Meter(
        flops_per_token=1e9,
        ranks=2,
        peak=peak,
        device=CPU,
        tokens=tokens,
        clock=clock,
        memory=lambda device: Memory(1.5, 0.25),
    )


def test_report() -> None:
    clock = _Clock()
    meter = _meter(clock)
    for _ in range(2):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.add(1000, computed=1000)
    with meter.pause():
        clock.now += 60.0
    assert meter.report(2, VALUES, lr=1e-3) == StepMetrics(
        step=2,
        loss=2.0,
        max_loss=3.5,
        grad_norm=0.25,
        lr=1e-3,
        tokens=2000,
        tokens_per_second=500.0,
        tflops=0.25,
        mfu=0.0625,
        memory_gib=1.5,
        data_wait=0.25,
        seconds=2.0,
        validation_loss=None,
        memory_share=0.25,
    )


def test_each_report_starts_anew_and_tokens_go_on() -> None:
    clock = _Clock()
    meter = _meter(clock, peak=None, tokens=70)
    clock.now += 100
    meter.start()
    meter.add(10, computed=10)
    clock.now += 1
    assert meter.report(1, VALUES, 0.1).tokens_per_second == 10.0
    meter.add(10, computed=10)
    clock.now += 4
    second = meter.report(2, VALUES, 0.1, validation=9.0)
    assert (second.tokens, second.tokens_per_second, second.data_wait) == (90, 2.5, 0.0)
    assert (second.mfu, second.validation_loss, meter.tokens) == (None, 9.0, 90)


def test_largest_row_mean() -> None:
    rows = RowLoss(torch.tensor([6.0, 0.0, 5.0], requires_grad=True), torch.tensor([3, 0, 2]))
    largest = largest_row_mean(rows)
    assert (largest.item(), largest.requires_grad) == (2.5, False)
    assert largest_row_mean(RowLoss(torch.zeros(2), torch.zeros(2, dtype=torch.int64))).item() == -math.inf


def _reduce() -> tuple[float, int, float, float]:
    rank = dist.get_rank()
    own = torch.tensor(1.0 + rank)
    reduced = reduce_step(torch.tensor(10.5 * (rank + 1)), torch.tensor(2**40 + rank), own, dist.group.WORLD)
    return reduced.loss_sum.item(), int(reduced.count), reduced.max_loss.item(), own.item()


def test_reduce_step() -> None:
    assert run_ranks(2, _reduce) == [(31.5, 2**41 + 1, 2.0, 1.0), (31.5, 2**41 + 1, 2.0, 2.0)]
    alone = reduce_step(torch.tensor(10.5), torch.tensor(3), torch.tensor(4.0), None)
    assert [value.item() for value in alone] == [10.5, 3, 4.0]


def test_json() -> None:
    metrics = _meter(_Clock(), peak=None).report(3, VALUES._replace(loss=math.nan, grad_norm=math.inf), 0.5)
    line = metrics.to_json()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "\n" not in line
    assert [entry[key] for key in ("step", "loss", "max_loss", "grad_norm", "lr", "mfu")] == [
        3,
        None,
        3.5,
        None,
        0.5,
        None,
    ]
    assert entry["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
    assert "validation_loss" not in entry


def test_json_of_validation_sets() -> None:
    held_out = Validated(None, {"a": None, "b": math.nan, "c": 2.0})
    entry = json.loads(_meter(_Clock()).report(3, VALUES, 0.5, held_out).to_json())
    assert (entry["validation_loss"], entry["validation_losses"]) == (None, {"a": None, "b": None, "c": 2.0})
    assert entry["nonfinite"] == {"validation_losses.b": "nan"}


def test_peaks_by_exact_name() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    assert peak_by_name("NVIDIA A100-SXM4-80GB", bf16) == pytest.approx(312e12)
    assert peak_by_name("NVIDIA H100 80GB HBM3", bf16) == pytest.approx(989.4e12)
    assert peak_by_name("NVIDIA H100 PCIe", bf16) == pytest.approx(756e12)
    assert peak_by_name("NVIDIA H100 NVL", bf16) == pytest.approx(835e12)
    assert peak_by_name("NVIDIA H200", fp32) == pytest.approx(66.9e12)
    assert peak_by_name("NVIDIA B200", bf16) == pytest.approx(2250e12)
    assert peak_by_name("AMD Instinct MI300X", bf16) == pytest.approx(1307.4e12)
    assert peak_by_name("NVIDIA L40S", fp32) == pytest.approx(91.6e12)
    assert peak_by_name("NVIDIA GeForce RTX 4090", bf16) == pytest.approx(165.2e12)
    assert peak_by_name("NVIDIA GeForce RTX 4090 Laptop GPU", bf16) is None
    assert peak_by_name("NVIDIA H100 80GB HBM3 MIG 1g.10gb", bf16) is None
    assert peak_by_name("NVIDIA H100 80GB HBM3", torch.float16) is None


def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CPU, torch.float32, None) is None
    assert peak_flops(CPU, torch.float32, 0.24) == pytest.approx(0.24e12)
    assert peak_flops(cuda, torch.bfloat16, None) == pytest.approx(989.4e12)
    assert peak_flops(cuda, torch.float32, None) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(cuda, torch.float32, None) is None


def test_memory_of_the_process() -> None:
    before = peak_memory(CPU)
    block = torch.ones(64 * 2**20)  # 256 MiB
    after = peak_memory(CPU)
    assert after.gib >= before.gib
    assert after.gib > block.nbytes / GIB
    assert after.share is not None
    assert 0 < after.share < 1


def test_memory_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 20 * GIB)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1 * GIB, 80 * GIB))
    assert peak_memory(torch.device("cuda", 0)) == Memory(20.0, 0.25)
