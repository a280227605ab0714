"""Where each tensor of theirs is in the files, under the name and with the shape that a table of names gives it.

Files say more than a table: a multimodal checkpoint holds the model as one of its parts, under longer names, and
quantized weights are two tensors instead of one. Both are settled here, once, so that tables know nothing of them and
import treats all sources alike. Torch-free; `hf_quantized` reads what is quantized.

FP8 (DeepSeek): a matrix `X.weight` of F8_E4M3 and `X.weight_scale_inv` of F32, a factor for each block of
`quantization_config.weight_block_size`. MXFP4 (GPT-OSS; OCP Microscaling Formats, 2023): `X_blocks` (experts, rows,
groups, 16 bytes of two values each) and `X_scales` (experts, rows, groups), exponents of 2, biased by 127.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.checkpoint.hf_config import Nested
from components.checkpoint.safetensors import Place, Places, some

GROUP = 32
"""Values of MXFP4 that share a scale; two of them are a byte."""
FP8, MXFP4 = "fp8", "mxfp4"
"""Values of `quant_method` that are read."""
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


@dataclass(frozen=True)
class Quantized:
    """A tensor that is two in the files: values, and what they are scaled with."""

    values: Place
    """The values."""
    scales: Place
    """Their factors, or exponents."""
    shape: tuple[int, ...]
    """Shape of the tensor that they are."""
    block: tuple[int, int] | None = None
    """FP8: rows and columns that share a factor; None: MXFP4."""

    dtype = "BF16"
    """The type that such a tensor counts as, and is exported in."""

    @property
    def file(self) -> str:
        """The file of the values."""
        return self.values.file

    @property
    def start(self) -> int:
        """First byte of the values."""
        return self.values.start


Source = Place | Quantized


@dataclass(frozen=True)
class Sources:
    """What the files hold of the model."""

    found: Mapping[str, Source]
    """Their tensors by the names that tables give them."""
    left_out: tuple[str, ...] = ()
    """Tensors of a multimodal checkpoint's other parts, by the names in the files."""
    problems: tuple[str, ...] = ()
    """What is wrong, a line each."""


def find_sources(places: Places, config: Mapping[str, Any], nested: Nested | None, quantized: bool) -> Sources:
    """The sources in files with these places and this config.json. `quantized`: the job's key says that they are."""
    left_out: list[str] = []
    problems = quantization_problems(config, quantized)
    if nested is not None and nested.text(config) is not None:
        left_out = sorted(name for name in places if name.startswith(nested.left_out))
        places, twice = _renamed({name: place for name, place in places.items() if name not in {*left_out}}, nested)
        problems += [f"{some(twice)} is there under two names"] if twice else []
    found: dict[str, Source] = dict(places)
    table = quantization(config) or {}
    if table.get("quant_method") == FP8:
        problems += _join_fp8(found, places, table.get("weight_block_size"))
    elif table.get("quant_method") == MXFP4:
        problems += _join_mxfp4(found, places)
    return Sources(found, tuple(left_out), tuple(problems))


def _renamed(places: Places, nested: Nested) -> tuple[dict[str, Place], list[str]]:
    """The places by the text model's own names, and those names that two of them would have."""
    renamed, twice = dict[str, Place](), list[str]()
    for name, place in places.items():
        own = nested.own_name(name)
        twice += [own] if own in renamed else []
        renamed[own] = place
    return renamed, twice


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The table `quantization_config` of a config.json, which a multimodal one may have with its text model."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        if (found := each.get("quantization_config")) is not None:
            return found if isinstance(found, Mapping) else {}
    return None


def quantization_problems(config: Mapping[str, Any], quantized: bool) -> list[str]:
    """Why weights with such a config.json are not read."""
    table, key = quantization(config), "checkpoint.initial_load_in_hf_quantized"
    if table is None:
        return [f"{key} = true, but config.json has no quantization_config: set it to false"] if quantized else []
    method = table.get("quant_method")
    if method not in (FP8, MXFP4):
        return [f'config.json: quantization_config.quant_method = {method!r}: only "{FP8}" and "{MXFP4}" are read']
    problems = [] if quantized else [f"config.json: the weights are quantized ({method}): set {key} to true"]
    if method == FP8 and (form := table.get("fmt") or "e4m3") != "e4m3":
        problems.append(f'config.json: quantization_config.fmt = {form!r}: only "e4m3" is read')
    if method == FP8 and _block(table.get("weight_block_size")) is None:
        size = table.get("weight_block_size")
        problems.append(f"config.json: quantization_config.weight_block_size = {size!r}: two lengths are needed")
    return problems


def _block(size: Any) -> tuple[int, int] | None:
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(each) is not int or each < 1 for each in size):
        return None
    return size[0], size[1]


def _join_fp8(found: dict[str, Source], places: Places, size: Any) -> list[str]:
    """Make one source of each matrix and its factors; what is wrong with them."""
    block, problems = _block(size), list[str]()
    for name in sorted(name for name in places if name.endswith(_SCALE)):
        del found[name]
        weight = name.removesuffix(_SCALE)
        if weight not in places:
            problems.append(f"{name} is there without {weight}")
        elif block and not (wrong := _fp8_problems(name, places[weight], places[name], block)):
            found[weight] = Quantized(places[weight], places[name], places[weight].shape, block)
        elif block:
            del found[weight]
            problems += wrong
    alone = [n for n, each in found.items() if isinstance(each, Place) and each.dtype == "F8_E4M3"] if block else []
    return _few([*problems, *(f"{name} is there without {name}{_SCALE}" for name in sorted(alone))])


def _fp8_problems(name: str, values: Place, scales: Place, block: tuple[int, int]) -> list[str]:
    weight = name.removesuffix(_SCALE)
    if values.dtype != "F8_E4M3" or scales.dtype != "F32":
        return [f"{weight} and {name} are of types {values.dtype} and {scales.dtype}, not F8_E4M3 and F32"]
    blocks = [-(-length // size) for length, size in zip(values.shape, block, strict=False)]
    if len(values.shape) != 2 or [*scales.shape] != blocks:
        return [f"{name} has shape {[*scales.shape]} for blocks of {[*block]} of {weight} {[*values.shape]}"]
    return []


def _join_mxfp4(found: dict[str, Source], places: Places) -> list[str]:
    """Make one source of each pair of blocks and scales; what is wrong with them."""
    stems = {name.removesuffix(end) for name in places for end in (_BLOCKS, _SCALES) if name.endswith(end)}
    problems = []
    for stem in sorted(stems):
        values, scales = (found.pop(stem + end, None) for end in (_BLOCKS, _SCALES))
        if not isinstance(values, Place) or not isinstance(scales, Place):
            there, lost = (_SCALES, _BLOCKS) if values is None else (_BLOCKS, _SCALES)
            problems.append(f"{stem}{there} is there without {stem}{lost}")
        elif stem in places:
            problems.append(f"{stem} is there, and {stem}{_BLOCKS} too")
        elif wrong := _mxfp4_problem(values, scales):
            problems.append(f"{stem}{_BLOCKS} and {stem}{_SCALES} are {wrong}")
        else:
            experts, rows, groups, _ = values.shape
            found[stem] = Quantized(values, scales, (experts, groups * GROUP, rows))
    return _few(problems)


def _mxfp4_problem(values: Place, scales: Place) -> str | None:
    fits = len(values.shape) == 4 and values.shape == (*scales.shape, GROUP // 2)
    if fits and (values.dtype, scales.dtype) == ("U8", "U8"):
        return None
    said = f"{values.dtype} {[*values.shape]} and {scales.dtype} {[*scales.shape]}"
    return f"{said}, not U8 (experts, rows, groups, {GROUP // 2}) and U8 (experts, rows, groups)"


def _few(problems: Iterable[str], shown: int = 20) -> list[str]:
    lines = [*problems]
    return lines[:shown] + ([f"and {len(lines) - shown} more like these"] if len(lines) > shown else [])
