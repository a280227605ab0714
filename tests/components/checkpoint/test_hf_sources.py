"""Files that say more than a table of names: multimodal checkpoints, and quantized weights, in one piece and cut."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from components.checkpoint.boxes import boxes_of
from components.checkpoint.hf_config import Adapter, Nested
from components.checkpoint.hf_import import load_hf
from components.checkpoint.hf_record import Record
from components.checkpoint.names import Merge, Rename, TheirsAlone
from components.checkpoint.ranks import Ranks
from components.runtime.errors import CheckpointError
from tests.components.checkpoint import hf_tiny as tiny
from tests.ranks import run_ranks

ALONE = Ranks(None)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Files of these tensors, the first half and the rest, and their config.json."""
    folder.mkdir(exist_ok=True)
    items = [*tensors.items()]
    files = {"a.safetensors": dict(items[: len(items) // 2]), "b.safetensors": dict(items[len(items) // 2 :])}
    for name, each in files.items():
        save_file({key: value.clone().contiguous() for key, value in each.items()}, folder / name)
    tiny.write_index(folder, {name: file for file, each in files.items() for name in each})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, ours: Mapping[str, Tensor], adapter: Adapter, **how: Any) -> list[str]:
    """What is wrong, item by item; nothing has been loaded."""
    before = {name: value.clone() for name, value in ours.items()}
    with pytest.raises(CheckpointError) as error:
        load_hf(str(folder), ours, adapter, tiny.Args(), ALONE, **how)
    assert tiny.same(ours, before)
    start = f"Hugging Face weights in '{folder}' do not fit: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start).split("; ")


NESTED = replace(
    tiny.ADAPTER,
    rules=lambda args: (Rename("l.{layer}.w", "model.{layer}.weight"), Rename("out", "lm_head.weight")),
    nested=Nested(("seer", "seer_next")),
)
TEXT = {**tiny.theirs(tiny.ours()), "out": torch.arange(5.0)}
PICTURES = ("vision_tower.encoder.0.weight", "multi_modal_projector.weight")


def seeing(prefix: str, head: str, pictures: str) -> dict[str, Tensor]:
    """The same model as a part of another, under other names."""
    text = {f"{prefix}{i}.weight": TEXT[f"their.{i}.weight"] for i in range(3)}
    return {**text, head: TEXT["out"], **{f"{pictures}{name}": torch.ones(2) for name in PICTURES}}


FORMS = {
    "published": seeing("language_model.model.", "language_model.lm_head.weight", ""),
    "transformers 5": seeing("model.language_model.", "lm_head.weight", "model."),
}


def blank() -> dict[str, Tensor]:
    return {**tiny.zeros(), "model.out": torch.zeros(5)}


@pytest.mark.parametrize("name", FORMS)
def test_the_text_model_of_a_multimodal_checkpoint(name: str, tmp_path: Path, told: list[str]) -> None:
    text = {"hidden_size": 4, "num_attention_heads": 1}
    folder, found = write(tmp_path / "model", FORMS[name], model_type="seer", text_config=text), blank()
    load_hf(str(folder), found, NESTED, tiny.Args(), ALONE)
    assert tiny.same(found, {**tiny.ours(), "model.out": TEXT["out"]})
    other = ", ".join(sorted(key for key in FORMS[name] if key.endswith(PICTURES)))
    assert told[-1].endswith(f"'{folder}'; left out 2 tensors of other parts: {other}")


def test_what_is_wrong_with_a_multimodal_checkpoint(tmp_path: Path) -> None:
    text = {"hidden_size": 8}
    tensors = {**FORMS["published"], "audio_tower.weight": torch.ones(2), "model.2.weight": torch.ones(4, 4)}
    folder = write(tmp_path / "model", tensors, model_type="seer", text_config=text)
    assert refusal(folder, blank(), NESTED) == [
        "config.json: head_dim = 8, this model has 4",
        "config.json: hidden_size = 8, this model has 4",
        "model.2.weight is there under two names",
        "not expected: audio_tower.weight",
    ]
    write(folder, FORMS["published"], model_type="hearer", text_config=text)
    assert refusal(folder, blank(), NESTED) == [
        'config.json: model_type = "hearer", this model is in seer or seer_next'
    ]
    # A text model by itself has no other parts, and a family without such checkpoints reads none.
    alone = {**seeing("model.", "lm_head.weight", "model."), PICTURES[0]: torch.ones(2)}
    write(folder, alone, hidden_size=4)
    told = f"not expected: model.{PICTURES[1]}, model.{PICTURES[0]}, {PICTURES[0]}"
    assert refusal(folder, blank(), NESTED) == [told]
    write(folder, FORMS["transformers 5"], model_type="seer", text_config={"hidden_size": 4})
    assert len(refusal(folder, blank(), replace(NESTED, nested=None))) == 2


def fp8(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, factors of blocks of 128 × 128 and the matrix that they are, block by block."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand([-(-length // 128) for length in shape], generator=generator) * 1e-3
    whole = values.float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            whole[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scales[row, column]
    return values, scales, whole


def mxfp4(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of experts' matrices (experts, rows, columns): every byte, and scales of all sizes."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    scales.view(-1)[:4] = torch.tensor([1, 2, 250, 127])
    return blocks, scales


def reference(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


MATRIX, ROWS, COLUMNS = (300, 200), 12, 96


def quantized_fp8() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Files and what they are: two quantized matrices, and a vector that is not."""
    (a, a_scales, a_whole), (b, b_scales, b_whole) = fp8(MATRIX, 1), fp8((7, 130), 2)
    files = {"a.weight": a, "b.weight_scale_inv": b_scales, "norm": torch.arange(3.0).bfloat16()}
    files |= {"b.weight": b, "a.weight_scale_inv": a_scales}
    return files, {"model.a": a_whole, "model.b": b_whole, "model.norm": torch.arange(3.0)}


def quantized_mxfp4(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Files and what they are: gates and values that take turns, a matrix that is transposed, biases."""
    up, down = mxfp4((4, 2 * ROWS, COLUMNS), 1), mxfp4((4, COLUMNS, 64), 2)
    bias = torch.arange(8.0 * ROWS).view(4, 2 * ROWS).bfloat16()
    files = {"up_blocks": up[0], "up_scales": up[1], "down_scales": down[1], "down_blocks": down[0], "up_bias": bias}
    fused = reference(*up, dtype).transpose(1, 2)
    ours = {"model.w1": fused[:, 0::2], "model.w3": fused[:, 1::2], "model.w2": reference(*down, dtype).transpose(1, 2)}
    return files, {**ours, "model.b1": bias[:, 0::2].to(dtype), "model.b3": bias[:, 1::2].to(dtype)}


NOTHING = replace(tiny.ADAPTER, to_config=lambda args: {}, defaults=lambda args: {})
OF_FP8 = replace(NOTHING, rules=lambda args: (Rename("a", "a.weight"), Rename("b", "b.weight"), Rename("norm", "norm")))
OF_MXFP4 = replace(
    NOTHING,
    rules=lambda args: (
        Merge(("w1", "w3"), "up", dim=1, interleaved=True, transposed=True),
        Merge(("b1", "b3"), "up_bias", dim=1, interleaved=True),
        Rename("w2", "down", transposed=True),
    ),
)


def load(folder: str, ours: Mapping[str, Tensor], adapter: Adapter, ranks: Ranks = ALONE) -> Record:
    return load_hf(folder, ours, adapter, tiny.Args(), ranks, quantized=True)


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32 if value.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_are_what_the_reference_makes_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit."""
    for name, (files, want), config, adapter in (
        ("fp8", quantized_fp8(), FP8, OF_FP8),
        ("mxfp4", quantized_mxfp4(dtype), MXFP4, OF_MXFP4),
    ):
        folder = write(tmp_path / name, files, quantization_config=config)
        found = {key: torch.full(value.shape, torch.nan, dtype=dtype) for key, value in want.items()}
        record = load(str(folder), found, adapter)
        for key, value in want.items():
            assert torch.equal(bits(found[key]), bits(value.to(dtype))), key
        assert record == Record("bfloat16")


def cut(folder: str) -> None:
    """On four ranks, in layouts that cut blocks and groups anywhere: each holds its part of what the reference says."""
    ranks = Ranks(torch.distributed.group.WORLD)
    mesh = init_device_mesh("cpu", (2, 2))
    for name, adapter in (("fp8", OF_FP8), ("mxfp4", OF_MXFP4)):
        want = load_file(f"{folder}/{name}/want")
        for placements in (
            (Shard(0), Shard(1)),
            (Shard(1), Replicate()),
            (Shard(-1), Shard(0)),
            (Shard(-1), Shard(-1)),
        ):
            parts = {key: distribute_tensor(value, mesh, _of(value, placements)) for key, value in want.items()}
            found = {key: torch.full_like(value, torch.nan) for key, value in parts.items()}
            assert all(isinstance(value, DTensor) for value in found.values())
            load(f"{folder}/{name}", found, adapter, ranks)
            there = boxes_of(parts)
            for key, box in boxes_of(found).items():
                assert torch.equal(bits(box.data), bits(there[key].data)), (name, key, placements)


def _of(value: Tensor, placements: tuple[Any, ...]) -> list[Any]:
    """The placements, as far as the tensor has such dimensions."""
    dims = [each.dim % value.ndim if isinstance(each, Shard) and each.dim < value.ndim else None for each in placements]
    return [Replicate() if dim is None else Shard(dim) for dim in dims]


def test_each_rank_dequantizes_what_it_holds(tmp_path: Path) -> None:
    for name, (files, want), config in (
        ("fp8", quantized_fp8(), FP8),
        ("mxfp4", quantized_mxfp4(torch.float32), MXFP4),
    ):
        folder = write(tmp_path / name, files, quantization_config=config)
        save_file({key: value.contiguous() for key, value in want.items()}, folder / "want")
    run_ranks(4, cut, str(tmp_path))


def test_the_job_says_whether_weights_are_quantized(tmp_path: Path) -> None:
    files, want = quantized_fp8()
    key = "checkpoint.initial_load_in_hf_quantized"
    for config in ({"quantization_config": FP8}, {"text_config": {"quantization_config": FP8}}):
        folder = write(tmp_path / "model", files, **config)
        assert refusal(folder, want, OF_FP8) == [
            f"config.json: the weights are quantized (fp8): set {key} to true",
        ]
    plain = write(tmp_path / "plain", {name.replace(".", "") + ".weight": want["model.a"] for name in ("a", "b")})
    assert refusal(plain, {"model.a": want["model.a"]}, OF_FP8, quantized=True)[0] == (
        f"{key} = true, but config.json has no quantization_config: set it to false"
    )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"quant_method": "gptq", "bits": 4},
        'config.json: quantization_config.quant_method = \'gptq\': only "fp8" and "mxfp4" are read',
    ),
    "not said": ({}, 'config.json: quantization_config.quant_method = None: only "fp8" and "mxfp4" are read'),
    "other form": ({**FP8, "fmt": "e5m2"}, "config.json: quantization_config.fmt = 'e5m2': only \"e4m3\" is read"),
    "no blocks": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "config.json: quantization_config.weight_block_size = None: two lengths are needed",
    ),
    "odd blocks": (
        {**FP8, "weight_block_size": [128, 0]},
        "config.json: quantization_config.weight_block_size = [128, 0]: two lengths are needed",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_ways_to_quantize(name: str, tmp_path: Path) -> None:
    files, want = quantized_fp8()
    config, told = CONFIGS[name]
    folder = write(tmp_path / "model", files, quantization_config=config)
    assert refusal(folder, want, OF_FP8, quantized=True)[0] == told


def test_factors_that_do_not_fit(tmp_path: Path) -> None:
    files, want = quantized_fp8()
    half = files["b.weight_scale_inv"].half()
    files |= {"a.weight_scale_inv": torch.ones(3, 3), "b.weight_scale_inv": half, "c.weight_scale_inv": torch.ones(1)}
    folder = write(tmp_path / "model", {**files, "d.weight": files["a.weight"].clone()}, quantization_config=FP8)
    assert refusal(folder, want, OF_FP8, quantized=True) == [
        "a.weight_scale_inv has shape [3, 3] for blocks of [128, 128] of a.weight [300, 200]",
        "b.weight and b.weight_scale_inv are of types F8_E4M3 and F16, not F8_E4M3 and F32",
        "c.weight_scale_inv is there without c.weight",
        "d.weight is there without d.weight_scale_inv",
        "missing: a.weight, b.weight",
        "not expected: d.weight",
    ]


def test_packed_values_that_do_not_fit(tmp_path: Path) -> None:
    files, want = quantized_mxfp4(torch.float32)
    lost = files.pop("down_scales")
    files |= {"up_scales": files["up_scales"][:, 1:].clone(), "more_scales": lost, "up": torch.ones(2)}
    files |= {"x_blocks": files["down_blocks"].clone(), "x_scales": lost.float()}
    folder = write(tmp_path / "model", files, quantization_config=MXFP4)
    told = "not U8 (experts, rows, groups, 16) and U8 (experts, rows, groups)"
    assert refusal(folder, want, OF_MXFP4, quantized=True) == [
        "down_blocks is there without down_scales",
        "more_scales is there without more_blocks",
        "up is there, and up_blocks too",
        f"x_blocks and x_scales are U8 [4, 96, 2, 16] and F32 [4, 96, 2], {told}",
        "missing: down",
        "up has shape [2], this model [4, 96, 24]",
    ]
    files, want = quantized_mxfp4(torch.float32)
    files["down_scales"][1, 2, 1] = 255
    folder = write(tmp_path / "nan", files, quantization_config=MXFP4)
    with pytest.raises(CheckpointError, match=r"safetensors holds scales of MXFP4 that are not a number \(255\)$"):
        load(str(folder), want, OF_MXFP4)


def test_quantized_tensors_that_have_no_place(tmp_path: Path) -> None:
    """A name of an extra stands for both of its tensors."""
    files, want = quantized_fp8()
    files |= {"mtp.weight": files["a.weight"].clone(), "mtp.weight_scale_inv": files["a.weight_scale_inv"].clone()}
    adapter = replace(OF_FP8, extras=lambda args: (TheirsAlone("mtp.weight"),))
    folder = write(tmp_path / "model", files, quantization_config=FP8)
    found = {name: torch.zeros_like(value) for name, value in want.items()}
    load(str(folder), found, adapter)
    assert tiny.same(found, want)
