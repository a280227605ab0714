"""Peak rates of devices, for MFU: the model's FLOP/s as a share of what the device could do.

Dense rates without sparsity, as the makers publish them. A device is looked up by its exact name: a laptop part or a
MIG slice is named like its bigger sibling and has another rate. What is not listed has no MFU, rather than a guess.
"""

import re

import torch

_TERA = 1e12

# name → dense TFLOP/s in (bfloat16 with fp32 accumulation, float32 outside tensor cores)
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"NVIDIA A100.*(40|80)GB", 312.0, 19.5),
    (r"NVIDIA A10", 125.0, 31.2),
    (r"NVIDIA A10G", 70.0, 31.5),
    (r"NVIDIA A30", 165.0, 10.3),
    (r"NVIDIA A40", 149.7, 37.4),
    (r"NVIDIA L4", 121.0, 30.3),
    (r"NVIDIA L40", 181.05, 90.5),
    (r"NVIDIA L40S", 362.05, 91.6),
    (r"NVIDIA H100( 80GB HBM3| SXM5.*)?", 989.4, 66.9),
    (r"NVIDIA H100 PCIe", 756.0, 51.0),
    (r"NVIDIA H100 NVL", 835.0, 60.0),
    (r"NVIDIA H200", 989.4, 66.9),
    (r"NVIDIA H200 NVL", 835.0, 60.0),
    (r"NVIDIA GH200 .*", 989.4, 66.9),
    (r"NVIDIA B200", 2250.0, 75.0),
    (r"NVIDIA GB200", 2500.0, 80.0),
    (r"NVIDIA GeForce RTX 3090", 71.0, 35.6),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    (r"NVIDIA GeForce RTX 5090", 209.5, 104.8),
    (r"AMD Instinct MI250X.*", 191.5, 23.9),
    (r"AMD Instinct MI300X.*", 1307.4, 163.4),
    (r"AMD Instinct MI325X.*", 1307.4, 163.4),
    (r"AMD Instinct MI355X.*", 2516.6, 157.3),
)


def peak_flops(device: torch.device, dtype: torch.dtype, override_tflops: float | None) -> float | None:
    """Dense peak rate of one device in FLOP/s; None where it is not known.

    `override_tflops` is `metrics.peak_tflops`. The float32 rate holds for true float32 only: with TF32 matmuls the
    peak is another, so it is not known.
    """
    if override_tflops is not None:
        return override_tflops * _TERA
    if device.type != "cuda" or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    return peak_by_name(torch.cuda.get_device_name(device), dtype)


def peak_by_name(name: str, dtype: torch.dtype) -> float | None:
    """The table: FLOP/s of the device that calls itself so; None if it is not listed."""
    for pattern, bf16, fp32 in _PEAKS:
        if re.fullmatch(pattern, name):
            return {torch.bfloat16: bf16 * _TERA, torch.float32: fp32 * _TERA}.get(dtype)
    return None
