"""What an export consists of, how it is committed, and what of it an import reads."""

import json
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.checkpoint import hf_export, hf_weights
from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.hf_export import Shard, export_hf, plan_shards
from components.checkpoint.hf_import import load_hf
from components.checkpoint.hf_read import portions, read_part
from components.checkpoint.hf_record import SOURCE as SOURCE_ENTRY
from components.checkpoint.hf_record import Record, read_record
from components.checkpoint.links import Link, Span
from components.checkpoint.local import LocalFolder
from components.checkpoint.names import OursAlone, Rename, TheirsAlone
from components.checkpoint.ranks import Ranks
from components.checkpoint.safetensors import Place
from components.checkpoint.storage import Folder, open_folder, open_storage
from components.runtime.errors import CheckpointError
from tests.components.checkpoint import hf_tiny as tiny
from tests.ranks import run_ranks

ALONE = Ranks(None)
ARGS = tiny.Args()


def export(root: Path, args: Any = ARGS, dtype: str = "float32", adapter: Any = tiny.ADAPTER, **more: Any) -> Folder:
    """Export step 1 of the checkpoints in root to root/out/step-1."""
    manifest = Checkpointer(root, keep_latest_k=0, group=None).read_manifest(1)
    source, target = open_storage(root).folder("step-1"), open_storage(root / "out")
    ranks = more.pop("ranks", ALONE)
    return export_hf(source, manifest, target, "step-1", adapter, args, dtype=dtype, ranks=ranks, **more)


def contents(folder: Folder | Path) -> dict[str, Tensor]:
    """All tensors of an export, as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder.path if not isinstance(folder, Path) else folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return found


def test_one_file(tmp_path: Path, told: list[str]) -> None:
    tiny.save(tmp_path, tiny.ours())
    folder = export(tmp_path)
    assert folder.names() == ["config.json", "generation_config.json", "manifest.json", "model.safetensors"]
    assert tiny.same(contents(folder), tiny.theirs(tiny.ours()))
    config = {"hidden_size": 4, "num_attention_heads": 1, "torch_dtype": "float32"}
    assert json.loads((tmp_path / "out/step-1/config.json").read_bytes()) == config
    raw = (tmp_path / "out/step-1/model.safetensors").read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    store = Checkpointer(tmp_path / "out", keep_latest_k=0, group=None)
    manifest = store.read_manifest(1)
    assert (manifest.kind, manifest.step, manifest.fingerprint) == ("hf", 1, tiny.JOB.fingerprint)
    assert store.verify(1) == []
    (line,) = [line for line in told if line.startswith("exported")]
    assert line.startswith(f"exported 3 tensors to '{tmp_path}/out/step-1': 0.0 MB in ")


def test_several_files(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    folder = export(tmp_path, dtype="bfloat16", shard_bytes=70)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    small = ["config.json", "generation_config.json", "manifest.json"]
    assert folder.names() == [*small, *names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out/step-1/model.safetensors.index.json").read_bytes())
    assert index == {
        "metadata": {"total_size": 96},
        "weight_map": {"their.0.weight": names[0], "their.1.weight": names[0], "their.2.weight": names[1]},
    }
    assert tiny.same(contents(folder), {k: v.bfloat16() for k, v in tiny.theirs(tiny.ours()).items()})
    found = tiny.zeros()
    load_hf(folder.path, found, tiny.ADAPTER, tiny.Args(), ALONE)
    assert tiny.same(found, tiny.ours())


def test_plans() -> None:
    shapes = {"a": (3,), "big": (10,), "b": (2,), "c": (1,), "scalar": ()}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    wide = [(name, shape, "F32") for name, shape in shapes.items()]
    assert plan_shards(wide, 16) == [
        Shard(names[0], (("a", (3,), "F32"),)),
        Shard(names[1], (("big", (10,), "F32"),)),
        Shard(names[2], (("b", (2,), "F32"), ("c", (1,), "F32"), ("scalar", (), "F32"))),
    ]
    narrow = [(name, shape, "BF16") for name, shape in shapes.items()]
    assert plan_shards(narrow, 34) == [Shard("model.safetensors", tuple(narrow))]
    mixed = [("a", (3,), "BF16"), ("b", (2,), "F32"), ("c", (1,), "F16"), ("d", (), "F64")]
    by_width = (mixed[3], mixed[1], mixed[0], mixed[2])
    assert plan_shards(mixed, 24) == [Shard("model.safetensors", by_width)]
    assert [shard.tensors for shard in plan_shards(mixed, 14)] == [(mixed[1], mixed[0]), (mixed[3], mixed[2])]


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    tensors = tiny.ours()
    tensors["model.l.1.w"][2, 3] = 1e5
    tensors["model.l.2.w"][0, 0] = torch.inf
    tiny.save(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        export(tmp_path, dtype="float16")
    assert str(error.value) == (
        f"cannot export to '{tmp_path}/out/step-1': their.1.weight: float16 cannot hold its largest value, 100000; "
        "take another checkpoint.export_dtype"
    )
    assert os.listdir(tmp_path / "out") == []
    assert torch.isinf(contents(export(tmp_path, dtype="bfloat16"))["their.2.weight"][0, 0])


def test_the_checkpoint_must_be_of_this_model(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    with pytest.raises(CheckpointError, match=r"has 48 parameters, this model.flavor 64"):
        export(tmp_path, tiny.Args(layers=4))


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    (tmp_path / "assets").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "notes.txt"):
        (tmp_path / "assets" / name).write_text(f'{{"file": "{name}"}}')
    folder = export(tmp_path, assets=str(tmp_path / "assets"))
    assert folder.names() == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out/step-1" / name).read_text() == f'{{"file": "{name}"}}'
    assert export(tmp_path, assets=str(tmp_path / "nowhere")).names() == folder.names()[:4]
    generation = json.loads((tmp_path / "out/step-1/generation_config.json").read_text())
    assert generation == {"_from_model_config": True}


ADDED = [{"id": 7, "content": "<s>"}, {"id": 8, "content": "</s>"}, {"id": "x", "content": "<pad>"}, "nothing"]
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "of the model": (
        {"config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}},
        {"bos_token_id": 1, "eos_token_id": [2, 3]},
    ),
    "of a part of it": (
        {"config.json": {"text_config": {"bos_token_id": 2, "eos_token_id": 1}, "eos_token_id": [1, 106]}},
        {"bos_token_id": 2, "eos_token_id": [1, 106]},
    ),
    "of the tokenizer": (
        {
            "config.json": {"eos_token_id": "</s>"},
            "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
            "tokenizer.json": {"added_tokens": ADDED},
        },
        {"bos_token_id": 7, "eos_token_id": 8},
    ),
    "of no token": ({"tokenizer_config.json": {"bos_token": "<s>"}, "tokenizer.json": {"added_tokens": []}}, {}),
    "of none": ({"config.json": [1]}, {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_those_of_the_assets(name: str, tmp_path: Path) -> None:
    files, ids = FOLDERS[name]
    tiny.save(tmp_path, tiny.ours())
    (tmp_path / "assets").mkdir()
    for file, content in files.items():
        (tmp_path / "assets" / file).write_text(json.dumps(content))
    export(tmp_path, assets=str(tmp_path / "assets"))
    out = tmp_path / "out/step-1"
    assert json.loads((out / "generation_config.json").read_text()) == {"_from_model_config": True, **ids}
    config = {"hidden_size": 4, "num_attention_heads": 1, "torch_dtype": "float32"}
    assert json.loads((out / "config.json").read_text()) == {**config, **ids}


def test_assets_that_are_no_json(tmp_path: Path, told: list[str]) -> None:
    tiny.save(tmp_path, tiny.ours())
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "config.json").write_text("[" * 10_000)
    export(tmp_path, assets=str(tmp_path / "assets"))
    assert any("is not JSON" in line and line.endswith("special tokens are not looked up in it") for line in told)


SOURCE = replace(
    tiny.ADAPTER,
    rules=lambda args: (*tiny.ADAPTER.rules(args), Rename("norm", "norm.weight")),
    extras=lambda args: (TheirsAlone("head", same_as="their.1.weight"), TheirsAlone("freq")),
)


@dataclass(frozen=True)
class WithNorm(tiny.Args):
    def parameter_count(self) -> int:
        return super().parameter_count() + 3


def source_files(folder: Path) -> dict[str, Tensor]:
    """Files of several types, with a head that is written out; their tensors."""
    third = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    tensors = {
        "their.0.weight": tiny.ours()["model.l.0.w"].bfloat16(),
        "their.1.weight": tiny.ours()["model.l.1.w"].bfloat16(),
        "their.2.weight": third.half(),
        "norm.weight": torch.tensor([0.1, 0.2, 0.3]),
        "head": tiny.ours()["model.l.1.w"].bfloat16(),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 4}')
    return tensors


def test_an_export_as_the_source_was(tmp_path: Path) -> None:
    """Names, shapes, types and bytes, through a checkpoint; in several files too."""
    tensors = source_files(tmp_path / "source")
    found = {**tiny.zeros(), "model.norm": torch.zeros(3)}
    record = load_hf(str(tmp_path / "source"), found, SOURCE, WithNorm(), ALONE)
    assert record == Record("bfloat16", {"norm.weight": "float32", "their.2.weight": "float16"}, ["head"])
    assert read_record({SOURCE_ENTRY: json.loads(json.dumps(record.plain()))}) == record
    store = Checkpointer(tmp_path, keep_latest_k=0, group=None)
    store.save(1, found, {}, replace(tiny.JOB, layout={SOURCE_ENTRY: record.plain()}), "model_only")
    for shard_bytes in (1000, 50):
        folder = export(tmp_path, WithNorm(), "source", SOURCE, shard_bytes=shard_bytes)
        written = contents(folder)
        assert {name: (value.dtype, value.shape) for name, value in written.items()} == {
            name: (value.dtype, value.shape) for name, value in tensors.items()
        }
        assert all(
            torch.equal(written[name].view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8))
            for name in tensors
        )
        assert json.loads((tmp_path / "out/step-1/config.json").read_text())["torch_dtype"] == "bfloat16"
        again = {**tiny.zeros(), "model.norm": torch.zeros(3)}
        assert load_hf(folder.path, again, SOURCE, WithNorm(), ALONE) == record
        assert tiny.same(again, found)
    assert len(folder.names()) > 5


def test_an_export_as_a_source_that_is_not_known(tmp_path: Path) -> None:
    def refused(layout: dict[str, Any]) -> str:
        root = tmp_path / f"of {len(os.listdir(tmp_path))}"
        store = Checkpointer(root, keep_latest_k=0, group=None)
        store.save(1, tiny.ours(), {}, replace(tiny.JOB, layout=layout), "model_only")
        with pytest.raises(CheckpointError) as error:
            export(root, dtype="source")
        assert not (root / "out" / "step-1").exists()
        return str(error.value).partition("': ")[2]

    assert refused({}) == (
        'export_dtype = "source": these weights do not come from Hugging Face files, whose types they could have;'
        ' take "float32", "bfloat16" or "float16"'
    )
    wrong = {"dtype": "int8", "others": {}, "besides": []}
    assert refused({SOURCE_ENTRY: wrong}).startswith("layout.hf_source of the manifest is no record: ")
    assert refused({SOURCE_ENTRY: {**wrong, "dtype": "float16", "besides": ["head"]}}) == (
        "head equals no tensor of this model"
    )


def test_an_export_of_that_name(tmp_path: Path, told: list[str]) -> None:
    """The same stays as it is; another one, or a broken one, is set aside."""
    tiny.save(tmp_path / "a", tiny.ours())
    out = tmp_path / "a" / "out"
    export(tmp_path / "a")
    (out / ".tmp-step-1-0123456789abcdef").mkdir()  # of a killed run
    first = (out / "step-1" / "manifest.json").stat()
    export(tmp_path / "a")
    stays = "is there already, exported from the same checkpoint: it stays as it is"
    assert told[-1] == f"'{out}/step-1' {stays}"
    assert os.listdir(out) == ["step-1"]
    assert (out / "step-1" / "manifest.json").stat().st_ino == first.st_ino
    export(tmp_path / "a", dtype="bfloat16")
    (aside,) = [name for name in os.listdir(out) if name != "step-1"]
    assert f"'{out}/step-1' was another export: it is now '{aside}'" in told
    assert aside.startswith("step-1.superseded-")
    os.truncate(out / "step-1" / "model.safetensors", 50)
    export(tmp_path / "a", dtype="bfloat16")
    assert len(os.listdir(out)) == 3
    assert Checkpointer(out, keep_latest_k=0, group=None).verify(1) == []


def test_storage_that_cannot_rename(tmp_path: Path) -> None:
    """The same through a URL, in both directions."""
    tiny.save(tmp_path, tiny.ours())
    manifest = Checkpointer(tmp_path, keep_latest_k=0, group=None).read_manifest(1)
    source, target = open_storage(tmp_path).folder("step-1"), open_storage(f"memory:/{tmp_path}/out")
    for dtype, count in (("float32", 1), ("float32", 1), ("bfloat16", 2)):
        how = {"dtype": dtype, "ranks": ALONE, "shard_bytes": 70}
        folder = export_hf(source, manifest, target, "step-1", tiny.ADAPTER, ARGS, **how)
        assert len(target.folder_names()) == count
        found = tiny.zeros()
        load_hf(folder.path, found, tiny.ADAPTER, ARGS, ALONE)
        assert tiny.same(found, tiny.ours())
    with pytest.raises(CheckpointError, match=r"neither model.safetensors.index.json nor model.safetensors is there"):
        load_hf(f"memory:/{tmp_path}/nowhere", found, tiny.ADAPTER, ARGS, ALONE)


def test_a_checkpoint_of_that_name_stays(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    tiny.save(tmp_path / "out", tiny.ours())
    with pytest.raises(CheckpointError) as error:
        export(tmp_path)
    told = "it is a model_only checkpoint: set checkpoint.export_folder to another folder"
    assert str(error.value) == f"cannot export to '{tmp_path}/out/step-1': {told}"
    assert os.listdir(tmp_path / "out") == ["step-1"]
    assert Checkpointer(tmp_path / "out", keep_latest_k=0, group=None).verify(1) == []


def test_what_the_other_side_has_no_place_for(tmp_path: Path, told: list[str]) -> None:
    adapter = replace(tiny.ADAPTER, rules=lambda args: (*tiny.ADAPTER.rules(args), OursAlone("bias", "the bias")))
    tensors = {**tiny.ours(), "model.bias": torch.full((3,), 5.0)}
    tiny.save(tmp_path, tensors)
    folder = export(tmp_path, adapter=adapter)
    assert [*contents(folder)] == ["their.0.weight", "their.1.weight", "their.2.weight"]
    assert told[-1].endswith("; left out, since Hugging Face has no place for it: the bias")
    found = {**tiny.zeros(), "model.bias": torch.full((3,), 7.0)}
    load_hf(folder.path, found, adapter, tiny.Args(), ALONE)
    assert tiny.same(found, {**tiny.ours(), "model.bias": torch.full((3,), 7.0)})
    path = f"'{tmp_path}/out/step-1'"
    assert told[-1] == f"loaded 3 tensors of Hugging Face weights from {path}; left as initialized: the bias"


def test_what_our_side_has_no_place_for(tmp_path: Path) -> None:
    """Only what is named; and a copy must be one."""
    extras = (TheirsAlone("freq"), TheirsAlone("copy", same_as="their.1.weight"))
    adapter = replace(tiny.ADAPTER, extras=lambda args: extras)
    folder = tmp_path / "model"

    def write(copy: Tensor, more: str = "freq") -> None:
        tiny.write_single(folder)
        tensors = {**tiny.theirs(tiny.ours()), "copy": copy, more: torch.ones(3)}
        (folder / "model.safetensors").write_bytes(tiny.file_bytes(tiny.header_of(tensors), tensors))

    def load() -> dict[str, Tensor]:
        found = tiny.zeros()
        try:
            load_hf(str(folder), found, adapter, tiny.Args(), ALONE)
        except CheckpointError:
            assert tiny.same(found, tiny.zeros())
            raise
        return found

    right = tiny.ours()["model.l.1.w"]
    write(right)
    assert tiny.same(load(), tiny.ours())
    for wrong in (right + torch.eye(4) * 1e-3, right.flatten()):
        write(wrong)
        with pytest.raises(CheckpointError) as error:
            load()
        told = "copy is not the same as their.1.weight, of which it must be a copy"
        assert str(error.value) == f"Hugging Face weights in '{folder}': {told}"
    write(right, "frequency")
    with pytest.raises(CheckpointError, match=r"do not fit: not expected: frequency$"):
        load()


def test_an_export_is_verified_when_it_is_imported(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    folder, found = export(tmp_path), tiny.zeros()
    file = tmp_path / "out/step-1/model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + b"?")

    def load(path: str, **more: Any) -> None:
        load_hf(path, found, tiny.ADAPTER, tiny.Args(), ALONE, **more)

    with pytest.raises(CheckpointError, match=f"model.safetensors: bytes 0 to {len(raw)} have changed"):
        load(folder.path)
    assert tiny.same(found, tiny.zeros())
    load(folder.path, verify="sizes")
    with pytest.raises(CheckpointError, match="is a model_only checkpoint of Espalier's"):
        load(str(tmp_path / "step-1"))


def test_types_are_cast(tmp_path: Path) -> None:
    folder = tiny.write_single(tmp_path / "model")
    found = {name: value.bfloat16() for name, value in tiny.zeros().items()}
    load_hf(str(folder), found, tiny.ADAPTER, tiny.Args(), ALONE)
    assert tiny.same(found, {name: value.bfloat16() for name, value in tiny.ours().items()})


class Counting:
    """A file that counts what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.read_bytes = file, 0

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)  # pyrefly: ignore[missing-attribute]  # not in BinaryIO
        self.read_bytes += count
        return count


@pytest.mark.parametrize(
    ("part", "read"),
    [
        ((Span(0, 6), Span(0, 5), Span(0, 4096)), 6 * 5 * 16384),
        ((Span(2, 1), Span(1, 2), Span(0, 4096)), 2 * 16384),
        ((Span(1, 3), Span(1, 2), Span(0, 4096)), 3 * 2 * 16384),
        ((Span(1, 3), Span(1, 2), Span(1000, 2000)), 3 * 2 * 8000),
        ((Span(1, 3), Span(4, 1), Span(4000, 96)), 3 * 16384),  # short runs: with what lies beside them
        ((Span(1, 2, 3), Span(0, 3, 2), Span(5, 2, 2000)), 4 * 5 * 8004),
        ((Span(1, 2, 3), Span(0, 3, 2), Span(5, 2, 4000)), 4 * 5 * 16384),  # short gaps: with what they are
        ((Span(1, 3), Span(0, 5), Span(1, 2048, 2)), 3 * 5 * 16384),
        ((Span(3, 2), Span(0, 5), Span(1024, 1024)), 2 * 5 * 4096),
    ],
)
def test_only_what_is_needed_is_read(part: tuple[Span, ...], read: int, tmp_path: Path) -> None:
    whole = torch.arange(6.0 * 5 * 4096).view(6, 5, 4096)
    (tmp_path / "file").write_bytes(b"x" * 24 + whole.numpy().tobytes())
    with (tmp_path / "file").open("rb") as opened:
        file: Any = Counting(opened)
        found = read_part(file, Place("file", "F32", (6, 5, 4096), 24), part)
        assert torch.equal(found, whole[tuple(span.slice for span in part)])
        assert file.read_bytes == read
    with (tmp_path / "file").open("rb") as opened, pytest.raises(CheckpointError, match="file ended before its last"):
        read_part(opened, Place("file", "F32", (7, 5, 4096), 24), (Span(6, 1), Span(0, 5), Span(0, 4096)))


@pytest.mark.parametrize("transposed", [False, True])
def test_large_links_are_read_in_portions(transposed: bool) -> None:
    """Along the outermost dimension of theirs, of which each element is in one of them."""
    whole = (Span(3, 1), Span(0, 5000), Span(7, 3000))
    theirs = (Span(1, 1), Span(0, 3000, 2), Span(4, 5000)) if transposed else (Span(0, 5000), Span(4, 3000, 2))
    parts = [*portions(Link("a", "b", whole, theirs, transposed))]
    assert sum(part.count for part in parts) == 5000 * 3000
    size = 5000 * 5999 if not transposed else 5999 * 5000
    rows = 3000 if transposed else 5000
    step = 2 if transposed else 1
    each = rows * (4 << 20) // size
    dim, their_dim, start = (2, 1, 7) if transposed else (1, 0, 0)
    assert len(parts) == -(-rows // each)
    for number, part in enumerate(parts):
        count = min(each, rows - number * each)
        assert part.our_part[dim] == Span(start + number * each, count)
        assert part.their_part[their_dim] == Span(number * each * step, count, step)
        for at in {0, 1, 2} - {dim}:
            assert part.our_part[at] == whole[at]
    scalar = Link("a", "b", (), ())
    assert [*portions(scalar)] == [scalar]


LAYERS, WIDTH = 30, 768  # 68 MiB of weights


def memory(root: str) -> tuple[float, float]:
    """Peaks of export and import above what was there before, in tensors; no piece is read twice."""
    args = tiny.Args(LAYERS, WIDTH)
    tiny.save(Path(root) / "warm", tiny.ours())
    export(Path(root) / "warm")
    tiny.save(Path(root), tiny.ours(args))
    reads = 0
    original = hf_weights.read_piece

    def counted(*given: Any) -> Tensor:
        nonlocal reads
        reads += 1
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_weights, "read_piece", counted)
        before = _now()
        folder = export(Path(root), args, "bfloat16", shard_bytes=5 << 20)
        exported = _peak() - before
    assert reads == LAYERS
    assert len(folder.names()) > 3
    found = tiny.zeros(args)
    for value in found.values():
        value.fill_(-1.0)  # its memory is really there
    before = _now()
    load_hf(folder.path, found, tiny.ADAPTER, args, ALONE)
    imported = _peak() - before
    assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in tiny.ours(args).items())
    return exported / (4 * WIDTH**2), imported / (4 * WIDTH**2)


def _peak() -> int:
    """The most memory that this process has held since `_now`, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


def _now() -> int:
    """The memory that this process holds, in bytes; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def test_memory_does_not_hold_the_model(tmp_path: Path) -> None:
    ((exported, imported),) = run_ranks(1, memory, str(tmp_path), backend=None)
    assert exported < 8.0  # of 30: the tensor as it was saved and as it is written, and what the heap has not returned
    assert imported < 6.0  # buffers of 4 MiB, to verify it


def failing(root: str, phase: str) -> list[str]:
    """One of two ranks cannot write its file, or no rank can commit; the errors, and what is there then."""
    ranks, texts = Ranks(dist.group.WORLD), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        if phase == "write" and ranks.rank == 1:
            patch.setattr(LocalFolder, "create", _fail)
        if phase == "commit":
            patch.setattr(os, "rename", _fail)
        with pytest.raises(CheckpointError) as error:
            export(Path(root), ranks=ranks, shard_bytes=70)
        texts.append(str(error.value))
    dist.barrier()
    return [*texts, *sorted(os.listdir(Path(root) / "out"))]


def _fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("phase", "who"), [("write", "rank 1: "), ("commit", "")])
def test_a_failure_on_one_rank_leaves_nothing(phase: str, who: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.ours())
    first, second = run_ranks(2, failing, str(tmp_path), phase)
    mend = "free space there, or lower checkpoint.keep_latest_k"
    assert first == [f"cannot export to '{tmp_path}/out/step-1': {who}No space left on device: {mend}"]
    assert second == first


def test_a_piece_that_is_something_else(tmp_path: Path) -> None:
    """The files of a checkpoint hold what `torch.save` writes; its index says where."""
    tiny.save(tmp_path, tiny.ours())
    folder = open_folder(tmp_path / "step-1")
    index = hf_export.read_files(folder, Checkpointer(tmp_path, keep_latest_k=0, group=None).read_manifest(1))[0]
    entry = index["model.l.1.w"]
    piece = entry.pieces[0]
    assert torch.equal(hf_weights.read_piece(folder, entry, piece), tiny.ours()["model.l.1.w"])
    with pytest.raises(CheckpointError, match=f"{piece.file} holds no tensor at byte {piece.start + 1}"):
        hf_weights.read_piece(folder, entry, replace(piece, start=piece.start + 1))
    with pytest.raises(CheckpointError, match="holds something else at byte"):
        hf_weights.read_piece(folder, replace(entry, dtype="bfloat16"), piece)
