import pytest
import torch

from components.runtime.device import compute_dtype, fast_bf16, pick_device
from components.runtime.errors import ConfigError
from components.runtime.world import World

CPU = torch.device("cpu")
ALONE = World(0, 0, 1)


def _pretend(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> list[int]:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.delenv("ESPALIER_DEVICE", raising=False)
    return chosen


def test_accelerator_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = _pretend(monkeypatch, "cuda", 4)
    assert pick_device(World(7, 3, 8)) == torch.device("cuda", 3)
    assert chosen == [3]


def test_more_local_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "cuda", 2)
    with pytest.raises(ConfigError) as caught:
        pick_device(World(2, 2, 4))
    assert str(caught.value) == (
        "environment: LOCAL_RANK = 2, but 2 cuda device(s) are visible: start at most 2 processes per machine (NGPU=2),"
        " or set ESPALIER_DEVICE=cpu"
    )


def test_variable_forces_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "cuda", 1)
    monkeypatch.setenv("ESPALIER_DEVICE", "cpu")
    assert pick_device(ALONE) == CPU


def test_mps_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "mps", 1)
    assert pick_device(ALONE) == CPU
    monkeypatch.setenv("ESPALIER_DEVICE", "mps")
    assert pick_device(ALONE) == torch.device("mps", 0)


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("ESPALIER_DEVICE", "cuda")
    with pytest.raises(ConfigError) as caught:
        pick_device(ALONE)
    assert str(caught.value) == (
        "environment: ESPALIER_DEVICE = 'cuda': no such device here; allowed: cpu, or unset it"
    )


def test_auto_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert (fast_bf16(CPU), fast_bf16(torch.device("cuda", 0))) == (False, True)
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert compute_dtype("auto", CPU, dry_run=True) == torch.bfloat16
    assert compute_dtype("float32", CPU, dry_run=True) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
