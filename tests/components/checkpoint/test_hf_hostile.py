"""Files of Hugging Face's form that lie, are cut off, or lead elsewhere: each is refused, and nothing is loaded."""

import contextlib
import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.runtime.errors import CheckpointError
from tests.components.checkpoint import hf_tiny as tiny

HEADER = tiny.header_of(tiny.theirs(tiny.ours()))
A, B, C = HEADER


def load(folder: Path) -> bool:
    """Whether all was loaded as it was written. Raises CheckpointError; nothing has been touched then."""
    found = tiny.zeros()
    try:
        load_hf(str(folder), found, tiny.ADAPTER, tiny.Args(), Ranks(None))
    except CheckpointError:
        assert tiny.same(found, tiny.zeros())
        raise
    return tiny.same(found, tiny.ours())


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    return str(error.value).replace(str(folder), "HERE")


def test_good_files_load(tmp_path: Path) -> None:
    assert load(tiny.write_single(tmp_path / "single"))
    assert load(tiny.write_sharded(tmp_path / "sharded"))


def changed(name: str, key: str, value: Any) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    header[name][key] = value
    return header


HEADERS: dict[str, tuple[Any, str]] = {
    "overlap": (changed(B, "data_offsets", [60, 124]), f"{B!r} begins at byte 60 of the data instead of 64"),
    "hole": (changed(B, "data_offsets", [68, 132]), f"{B!r} begins at byte 68 of the data instead of 64"),
    "same bytes twice": (changed(B, "data_offsets", [0, 64]), f"{B!r} begins at byte 0 of the data instead of 64"),
    "beyond the end": (changed(C, "data_offsets", [128, 196]), f"{C!r} has 68 bytes, not those of F32 [4, 4]"),
    "a longer last one": (
        {**HEADER, "x": {"dtype": "F32", "shape": [1], "data_offsets": [192, 196]}},
        "is cut off or too long: 192 bytes of data instead of 196",
    ),
    "bytes that nobody claims": (
        {A: HEADER[A], B: HEADER[B]},
        "is cut off or too long: 192 bytes of data instead of 128",
    ),
    "backwards": (changed(A, "data_offsets", [64, 0]), f"{A!r} has -64 bytes, not those of F32 [4, 4]"),
    "negative": (changed(A, "data_offsets", [-64, 0]), f"{A!r} has the shape [4, 4] and data_offsets [-64, 0]"),
    "huge": (changed(A, "data_offsets", [0, 1 << 64]), f"{A!r} has the shape [4, 4] and data_offsets [0, {1 << 64}]"),
    "huge shape": (changed(A, "shape", [1 << 62, 4]), f"{A!r} has 64 bytes, not those of F32 [{1 << 62}, 4]"),
    "negative shape": (changed(A, "shape", [-4, -4]), f"{A!r} has the shape [-4, -4]"),
    "shape of floats": (changed(A, "shape", [4.0, 4]), f"{A!r} has the shape [4.0, 4]"),
    "shape of truths": (changed(A, "shape", [True, 16]), f"{A!r} has the shape [True, 16]"),
    "long shape": (changed(A, "shape", [1] * 9), f"{A!r} has the shape [1, 1, 1, 1, 1, 1, 1, 1, 1]"),
    "shape no list": (changed(A, "shape", "44"), f"{A!r} has the shape '44'"),
    "three offsets": (
        changed(A, "data_offsets", [0, 64, 64]),
        f"{A!r} has the shape [4, 4] and data_offsets [0, 64, 64]",
    ),
    "unknown type": (changed(A, "dtype", "F33"), f"{A!r} has the type 'F33', which is not known"),
    "type of lists": (changed(A, "dtype", ["F32"]), f"{A!r} has the type ['F32'], which is not known"),
    "more keys": (changed(A, "code", "print"), f"{A!r} has not exactly dtype, shape and data_offsets"),
    "no entry": ({**HEADER, A: 7}, f"{A!r} has not exactly dtype, shape and data_offsets"),
    "no object": (b"[]", "the header of model.safetensors is not a JSON object"),
    "no JSON": (b"\x80\x04cos\nsystem\n", "the header of model.safetensors is not JSON"),
    "deep": (b"[" * 100_000, "the header of model.safetensors is not JSON"),
    "a name twice": (
        json.dumps(HEADER).replace(B, A).encode(),
        "the header of model.safetensors says a name twice",
    ),
    "number of a million digits": (b'{"x":' + b"9" * 1_000_000 + b"}", "the header of model.safetensors is not JSON"),
    "quantized": (
        {**HEADER, A: {"dtype": "I32", "shape": [4, 4], "data_offsets": [0, 64]}},
        f"{A} is of type I32, which is not one of F64, F32, F16, BF16",
    ),
    "another shape": (changed(A, "shape", [16]), f"{A} has shape [16], this model [4, 4]"),
    "another name": (
        {**{f"{n}x": HEADER[n] for n in (A,)}, B: HEADER[B], C: HEADER[C]},
        f"missing: {A}; not expected: {A}x",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    header, text = HEADERS[name]
    assert text in refusal(tiny.write_single(tmp_path / "model", header))


def test_header_bombs(tmp_path: Path) -> None:
    folder = tiny.write_single(tmp_path / "model")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    for length in (size - 7, 1 << 40, (1 << 64) - 1):
        file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
        assert f"is cut off or no safetensors file: {size} bytes, header of {length}" in refusal(folder)
    os.truncate(file, 1 << 32)  # a hole on the disk, so that there are as many bytes as the header claims
    with file.open("r+b") as opened:
        opened.write(struct.pack("<Q", 1 << 30))
    assert f"has a header of {1 << 30} bytes: more than {32 << 20} are not read" in refusal(folder)


@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
def test_every_truncation_is_found(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            refusal(folder)
        file.write_bytes(whole)
    assert load(folder)


def test_no_changed_byte_of_a_header_loads_something_else(tmp_path: Path) -> None:
    folder = tiny.write_single(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for at in range(len(whole) - 3 * 64):
        for flip in (0x01, 0x10, 0x80):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            with contextlib.suppress(CheckpointError):
                assert load(folder)


INDEXES: dict[str, tuple[Any, str]] = {
    "parent": ({A: "../secret.safetensors"}, "'../secret.safetensors' is no plain name of a .safetensors file"),
    "root": ({A: "/etc/secret.safetensors"}, "'/etc/secret.safetensors' is no plain name of a .safetensors file"),
    "sub-folder": ({A: "x/a.safetensors"}, "'x/a.safetensors' is no plain name of a .safetensors file"),
    "pickle": ({A: "pytorch_model.bin"}, "'pytorch_model.bin' is no plain name of a .safetensors file"),
    "hidden": ({A: ".a.safetensors"}, "'.a.safetensors' is no plain name of a .safetensors file"),
    "a number": ({A: 3}, "3 is no plain name of a .safetensors file"),
    "a list": ([A], "model.safetensors.index.json has no table weight_map"),
    "nothing": ({}, "model.safetensors.index.json has no table weight_map"),
    "absent file": (
        {A: "c.safetensors"},
        "model.safetensors.index.json names c.safetensors, not found here; copy or download it again",
    ),
    "other file": (
        {A: "b.safetensors", B: "a.safetensors", C: "b.safetensors"},
        f"a.safetensors holds {A}, which model.safetensors.index.json does not say; "
        f"b.safetensors does not hold {A}, as model.safetensors.index.json says",
    ),
    "less than is there": (
        {A: "a.safetensors", C: "b.safetensors"},
        f"a.safetensors holds {B}, which model.safetensors.index.json does not say",
    ),
    "more than is there": (
        {A: "a.safetensors", B: "a.safetensors", C: "b.safetensors", "x": "b.safetensors"},
        "b.safetensors does not hold x, as model.safetensors.index.json says",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name: str, tmp_path: Path) -> None:
    weight_map, text = INDEXES[name]
    folder = tiny.write_sharded(tmp_path / "model")
    tiny.write_index(folder, weight_map)
    assert text in refusal(folder)


def test_links_are_not_followed(tmp_path: Path) -> None:
    for number, name in enumerate(("model.safetensors.index.json", "config.json", "a.safetensors")):
        folder = tiny.write_sharded(tmp_path / f"model{number}")
        os.rename(folder / name, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", folder / name)
        assert f"{name} is not a regular file" in refusal(folder)


def test_pipes_do_not_block(tmp_path: Path) -> None:
    folder = tiny.write_single(tmp_path / "model")
    os.remove(folder / "model.safetensors")
    os.mkfifo(folder / "model.safetensors")
    assert refusal(folder) == "Hugging Face weights in 'HERE': model.safetensors is not a regular file"


def test_what_is_not_there(tmp_path: Path) -> None:
    folder = tiny.write_single(tmp_path / "model")
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    assert refusal(folder) == (
        "Hugging Face weights in 'HERE': neither model.safetensors.index.json nor model.safetensors is there; "
        "only safetensors are read, no pickles (.bin, .pth), which run code"
    )
    assert "No such file or directory" in refusal(tmp_path / "nowhere")
    os.rename(folder / "pytorch_model.bin", folder / "model.safetensors")
    for content, text in (("", "is not JSON"), ("[1]", "is not a JSON object"), ("[" * 9999, "is not JSON")):
        (folder / "config.json").write_text(content)
        assert f"config.json {text}" in refusal(folder)
    (folder / "config.json").write_text(" " * 2_000_000)
    assert "config.json has 2000000 bytes: more than 1048576 are not read" in refusal(folder)
    os.remove(folder / "config.json")
    assert "config.json is not there: without it nobody knows what the weights are of" in refusal(folder)
