"""Which model, in which shape, and what is converted in it: `[model]`, `[quantize.*]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import NonNegativeInt


@dataclass(frozen=True)
class Model:
    """`[model]`: family, flavor, tokenizer, converters."""

    name: str = "llama3"
    """Registered name of the model family."""
    flavor: str = "debugmodel"
    """Name of one of the family's shapes."""
    hf_assets_path: str = "./tests/assets/tokenizer"
    """Folder with `tokenizer.json` (and later `config.json` and safetensors). Looked up from the current folder, then
    from the project's."""
    mtp_layers: NonNegativeInt | None = None
    """Modules of multi-token prediction, each of which also predicts one token further ahead, in training alone; see
    `loss.mtp_coefficient`. 0: none. None: the flavor's."""
    tokenizer_path: str | None = None
    """Older name of `hf_assets_path`; wins where it is set."""
    converters: list[str] = field(default_factory=list)
    """Registered names of model converters, applied in this order before the model is parallelized."""
    print_after_conversion: bool = False
    """Print the module tree after the converters ran."""


@dataclass(frozen=True)
class Float8Linear:
    """`[quantize.linear.float8]`: read by the converter `quantize.linear.float8`, inactive without it."""

    enable_fsdp_float8_all_gather: bool = False
    """All-gather FSDP shards in float8: half the bytes of bf16. Tensorwise scaling only."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """One reduction for all scales after each optimizer step. Needs `enable_fsdp_float8_all_gather`."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Scaling recipe; None is tensorwise."""
    filter_fqns: list[str] = field(default_factory=list)
    """Linears whose full name contains one of these stay as they are; `auto_filter_small_kn` skips those too small to
    gain."""
    emulate: bool = False
    """Compute in high precision what float8 would give; for hardware without float8 kernels."""


@dataclass(frozen=True)
class MXLinear:
    """`[quantize.linear.mx]`: read by the converter `quantize.linear.mx`, inactive without it."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel that casts along dimension 1."""
    recipe_name: str = "mxfp8_cublas"
    """Name of torchao's recipe."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Linears whose full name contains one of these stay as they are."""


@dataclass(frozen=True)
class Float8GroupedMM:
    """`[quantize.grouped_mm.float8]`: read by the converter `quantize.grouped_mm.float8`, inactive without it."""

    fqns: list[str] | str = field(default_factory=list)
    """Names of the expert modules to convert."""


@dataclass(frozen=True)
class MXGroupedMM:
    """`[quantize.grouped_mm.mx]`: read by the converter `quantize.grouped_mm.mx`, inactive without it."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Name of torchao's recipe."""
    fqns: list[str] | str = field(default_factory=list)
    """Names of the expert modules to convert."""


@dataclass(frozen=True)
class QuantizeLinear:
    """`[quantize.linear]`: recipes for linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    """Float8 training of linears."""
    mx: MXLinear = field(default_factory=MXLinear)
    """MXFP8 training of linears."""


@dataclass(frozen=True)
class QuantizeGroupedMM:
    """`[quantize.grouped_mm]`: recipes for grouped expert matmuls."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """Float8 training of experts."""
    mx: MXGroupedMM = field(default_factory=MXGroupedMM)
    """MXFP8 training of experts."""


@dataclass(frozen=True)
class Quantize:
    """`[quantize]`: settings of the quantizing converters."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
    """Linear layers."""
    grouped_mm: QuantizeGroupedMM = field(default_factory=QuantizeGroupedMM)
    """Grouped expert matmuls."""
