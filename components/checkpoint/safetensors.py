"""The safetensors format: 8 bytes with the length of a JSON header, the header, the tensors' raw little-endian bytes.

Read and written here rather than through the library of that name, which writes whole files out of memory and reads
from local paths alone. Nothing in a file is trusted: the header is bounded before it is read, and every number in it is
checked against the file's size before it is used. Torch-free.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from components.checkpoint.storage import Folder
from components.runtime.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types that weights can have: theirs → torch's."""
_MAX_HEADER = 32 << 20  # 36,000 tensors in one file take 5 MB
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_BITS |= {"U16": 16, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_MAX_DIMENSIONS = 8
_SHOWN = 8
AGAIN = "copy or download it again"
"""What helps against a file that is not whole."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is."""

    file: str
    """Name of the file."""
    dtype: str
    """Type, in the format's words."""
    shape: tuple[int, ...]
    """Shape."""
    start: int
    """First byte in the file."""


Places = Mapping[str, Place]


def some(names: Iterable[str]) -> str:
    """Names for a message, sorted; the first few and a count if there are many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a type in FLOATS."""
    return _BITS[dtype] // 8


def render_header(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> bytes:
    """What a file with these tensors (name, shape, type) begins with. Wider types must come first, so that each tensor
    begins at a multiple of its element's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in tensors:
        end = start + math.prod(shape) * item_bytes(dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def read_places(folder: Folder) -> dict[str, Place]:
    """Where each tensor of a folder is, by its index, or in its only file; every header is checked.

    Raises CheckpointError with all that is wrong, OSError.
    """
    names = folder.names()
    if INDEX in names:
        return _indexed(folder, _parse_index(_read_small(folder, INDEX)))
    if SINGLE not in names:
        raise CheckpointError(
            f"neither {INDEX} nor {SINGLE} is there; only safetensors are read, no pickles (.bin, .pth), which run code"
        )
    return read_header(folder, SINGLE)


def _indexed(folder: Folder, index: Mapping[str, str]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    lost = {*index.values()} - {*folder.names()}
    problems = [f"{INDEX} names {some(lost)}, not found here; {AGAIN}"] if lost else []
    for file in sorted({*index.values()} - lost):
        found = read_header(folder, file)
        stray = {name for name in found if index.get(name) != file}
        absent = {name for name, where in index.items() if where == file and name not in found}
        problems += [f"{file} holds {some(stray)}, which {INDEX} does not say"] if stray else []
        problems += [f"{file} does not hold {some(absent)}, as {INDEX} says"] if absent else []
        places |= found
    if problems:
        raise CheckpointError("; ".join(problems))
    return places


def _read_small(folder: Folder, name: str) -> bytes:
    if (size := folder.size(name)) > _MAX_HEADER:
        raise CheckpointError(f"{name} has {size} bytes: more than {_MAX_HEADER} are not read")
    with folder.open(name) as file:
        return file.read(_MAX_HEADER)


def _parse_index(raw: bytes) -> dict[str, str]:
    index = _parse_json(raw, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{INDEX} has no table weight_map")
    if wrong := [file for file in index.values() if not isinstance(file, str) or not _FILE.fullmatch(file)]:
        raise CheckpointError(f"{INDEX}: {wrong[0]!r} is no plain name of a .safetensors file")
    return index


def _parse_json(raw: bytes, what: str) -> dict[str, Any]:
    try:
        content = json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, what))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise CheckpointError(f"{what} says a name twice")
    return table


def read_header(folder: Folder, file: str) -> dict[str, Place]:
    """Where each tensor of one file is. Raises CheckpointError for anything that the format does not allow, OSError."""
    size = folder.size(file)
    with folder.open(file) as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise CheckpointError(
                f"{file} is cut off or no safetensors file: {size} bytes, header of {length}; {AGAIN}"
            )
        if length > _MAX_HEADER:
            raise CheckpointError(f"{file} has a header of {length} bytes: more than {_MAX_HEADER} are not read")
        raw = opened.read(length)
    header = _parse_json(raw, f"the header of {file}")
    header.pop("__metadata__", None)
    return _checked(file, header, size - _LENGTH_BYTES - length, _LENGTH_BYTES + length)


def _checked(file: str, header: Mapping[str, Any], data_bytes: int, first: int) -> dict[str, Place]:
    """The places that a header gives; its tensors must fill the file exactly, one after the other."""
    spans, places = list[tuple[int, int, str]](), dict[str, Place]()
    for name, entry in header.items():
        dtype, shape, (start, end) = _entry(entry, f"{file}: {name!r}")
        spans.append((start, end, name))
        places[name] = Place(file, dtype, shape, first + start)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise CheckpointError(f"{file}: {name!r} begins at byte {start} of the data instead of {at}")
        at = end
    if at != data_bytes:
        raise CheckpointError(f"{file} is cut off or too long: {data_bytes} bytes of data instead of {at}; {AGAIN}")
    return places


def _entry(entry: Any, what: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{what} has the type {dtype!r}, which is not known")
    if not (_are_counts(shape, _MAX_DIMENSIONS) and _are_counts(offsets, 2) and len(offsets) == 2):
        raise CheckpointError(f"{what} has the shape {shape!r} and data_offsets {offsets!r}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise CheckpointError(f"{what} has {offsets[1] - offsets[0]} bytes, not those of {dtype} {shape}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_counts(value: Any, at_most: int) -> bool:
    if not isinstance(value, list) or len(value) > at_most:
        return False
    return all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Fill the buffer from where the file stands, without a copy in between; bytes read, fewer only at its end."""
    at = 0
    while at < len(buffer):
        count = file.readinto(buffer[at:])  # pyrefly: ignore[missing-attribute]  # not in BinaryIO
        if not count:
            break
        at += count
    return at
