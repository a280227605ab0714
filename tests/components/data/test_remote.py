"""Data behind URLs: the same documents as from files here, in forked workers too; and what is told where it fails."""

import asyncio
import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from components.data.documents import DatasetRequest, RandomAccess, Sequential, place_of
from components.data.files import open_files
from components.data.registry import open_dataset
from components.data.token_paths import find_tokens, is_tokens
from components.runtime.errors import DataError
from tests.components.data.corpus import loaders, readers, run, streamed, texts, write_lines

DOCUMENTS = texts(30)


class Looped(AsyncFileSystem):
    """A store like that of S3: everything through the thread of an event loop, which no fork takes along."""

    protocol = "looped"

    async def _info(self, path: str, **more: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        found = LocalFileSystem().info(path)
        return {x: found[x] for x in ("name", "size", "type")} | {"ETag": f'"{os.stat(path).st_mtime_ns}"'}

    async def _ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        infos = [await self._info(f"{path.rstrip('/')}/{x}") for x in sorted(os.listdir(path))]
        return infos if detail else [x["name"] for x in infos]

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        await asyncio.sleep(0)
        return Path(path).read_bytes()[start:end]

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: Any = True,
        cache_options: Any = None,
        **more: Any,
    ) -> "LoopedFile":
        return LoopedFile(self, path, mode, block_size=100)


class LoopedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


@pytest.fixture(autouse=True)
def stores() -> Iterator[None]:
    fsspec.register_implementation("looped", Looped, clobber=True)
    yield
    fsspec.filesystem("memory").store.clear()


def url(kind: str, folder: Path) -> str:
    """Where the files of a folder are, copied there if need be."""
    if kind == "memory":
        for path in folder.iterdir():
            fsspec.filesystem("memory").pipe(f"/corpus/{path.name}", path.read_bytes())
        return "memory://corpus"
    return f"{kind}://{folder}"


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith("parquet"):
        table = pyarrow.table({"n": range(30), "text": DOCUMENTS})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    return write_lines(path, DOCUMENTS)


KINDS = ("memory", "file", "looped")
NAMES = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_documents_as_from_a_file(kind: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    place = url(kind, tmp_path)
    opened = open_files(f"{place}/{name}", ("text",))
    stream = name.endswith((".gz", ".zst")) or (name == "x.jsonl" and kind != "file")
    assert isinstance(opened, Sequential if stream else RandomAccess)
    for found in (f"{place}/{name}", f"{place}/*", place):
        assert [x() for x in readers(found)] == DOCUMENTS
    same = {x: opened.fingerprint[x] for x in ("files", "bytes", "digest")}
    assert same == open_files(str(path)).fingerprint
    assert ("contents" in opened.fingerprint) is (kind == "looped")


@pytest.mark.parametrize(("kind", "name"), [("memory", "x.jsonl.gz"), ("looped", "x.jsonl"), ("looped", "x.parquet")])
def test_rows_in_forked_workers(kind: str, name: str, tmp_path: Path) -> None:
    """After this process has used its own connection, which a fork does not take along."""
    write(tmp_path, name)
    source = streamed(open_files(f"{url(kind, tmp_path)}/{name}", ("text",)), streams=2, seed=3)
    here = [x for x, _ in run(loaders(source, 2, 1), 12)]
    there = [x for x, _ in run(loaders(source, 2, 1, 2), 12)]
    assert torch.equal(torch.stack(here), torch.stack(there))


def test_text_files_and_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", ".hidden.txt", "LICENSE"):
        (tmp_path / name).write_text(name)
    for kind in KINDS:
        assert [x() for x in readers(url(kind, tmp_path))] == ["a.txt", "b.md"]


def test_splits_and_patterns(tmp_path: Path) -> None:
    for name in ("c4-train.0.json.gz", "c4-validation.0.json.gz"):
        write_lines(tmp_path / name, [name])
    place = url("memory", tmp_path)
    for name, split in (("c4", None), ("mine", "train")):
        opened = open_dataset(name, DatasetRequest(place, "text", 8, 10, 0, False, ("text",), split))
        assert isinstance(opened, Sequential)
        assert [x() for x in opened.records(0)] == [{"text": "c4-train.0.json.gz"}]


def test_places(tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl")
    write(tmp_path, "x.parquet")
    memory = url("memory", tmp_path)
    opened = open_files(f"{memory}/x.jsonl")
    assert isinstance(opened, Sequential)
    assert place_of(list(opened.records(0))[4], 4) == "memory://corpus/x.jsonl:5"
    assert place_of(open_files(f"looped://{tmp_path}/x.parquet"), 9) == f"looped://{tmp_path}/x.parquet[row group 1]:10"


def test_a_change_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "x.parquet")
    memory = fsspec.filesystem("memory")
    place = url("memory", tmp_path)
    sources = [open_files(f"{x}/x.parquet") for x in (place, f"looped://{tmp_path}")]
    raw = path.read_bytes()
    memory.pipe("/corpus/x.parquet", raw)
    path.write_bytes(raw)
    for source, name in zip(sources, (f"{place}/x.parquet", f"looped://{path}"), strict=True):
        assert isinstance(source, RandomAccess)
        with pytest.raises(DataError) as error:
            source.document(0)
        assert str(error.value) == f"{name}: was written to while the run read it; restore the file as it was"
    memory.rm("/corpus/x.parquet")
    path.write_bytes(raw[:-1])
    how = ("has vanished", f"was truncated from {len(raw)} to {len(raw) - 1} bytes")
    for source, what in zip(sources, how, strict=True):
        assert isinstance(source, RandomAccess)
        with pytest.raises(DataError, match=f"/x.parquet: {what} while the run read it; restore the file as it was$"):
            source.document(0)


def test_a_stream_that_changes_between_two_passes() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/x.jsonl", b'{"text": "a"}\n')
    opened = open_files("memory://corpus/x.jsonl")
    assert isinstance(opened, Sequential)
    assert [x() for x in opened.records(0)] == [{"text": "a"}]
    memory.pipe("/corpus/x.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError) as error:
        opened.records(0)
    told = "grew from 14 to 28 bytes while the run read it; restore the file as it was"
    assert str(error.value) == f"memory://corpus/x.jsonl: {told}"


def test_a_bad_record_and_a_damaged_file() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/x.jsonl", b'{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"^memory://corpus/x\.jsonl:2:1: field 'text' is int, not text; mend"):
        readers("memory://corpus/x.jsonl")[1]()
    memory.pipe("/corpus/y.jsonl.gz", gzip.compress(json.dumps({"text": "a"}).encode())[:-3])
    with pytest.raises(DataError, match=r"^memory://corpus/y\.jsonl\.gz:1:1: the compressed file is damaged"):
        readers("memory://corpus/y.jsonl.gz")[0]()


MEND = "see that it can be reached from here, with credentials that may read there, on every machine"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/x.jsonl", "Install s3fs to access S3: install that package on every machine"),
        ("nothing://x/y", "fsspec knows no nothing://; give a path, or a URL as in s3://bucket/name"),
        ("memory://no/x.jsonl", "nothing is there; check dataset_path, or the path of the source"),
        ("memory://no/*.jsonl", "nothing is there; check dataset_path, or the path of the source"),
        ("file:///no/such/x.jsonl", "no such file or folder (looked in the current folder and the project's);"),
        ("broken://x.jsonl", f"cannot be read (LookupError: no route); {MEND}"),
    ],
)
def test_what_cannot_be_reached(place: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(LocalFileSystem):
        protocol = "broken"

        def info(self, path: str, **more: Any) -> dict[str, Any]:
            raise LookupError("no route\nat all")

    fsspec.register_implementation("broken", Broken, clobber=True)
    if place.startswith("s3"):
        monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError) as error:
        open_files(place)
    shown = place.removeprefix("file://")
    assert str(error.value).startswith(f"{shown}: {message}")


@pytest.mark.parametrize("given", ["s3://bucket/x", "s3://bucket/x.idx", "nothing://x/y", "s3://bucket/*.bin"])
def test_a_path_of_token_files_is_named_as_it_was_given(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    why = {"s3": "Install s3fs to access S3: install that package on every machine"}
    why["nothing"] = "fsspec knows no nothing://; give a path, or a URL as in s3://bucket/name"
    for find in (is_tokens, find_tokens):
        with pytest.raises(DataError) as error:
            find(given)
        assert str(error.value) == f"{given}: {why[given.partition('://')[0]]}"
    with pytest.raises(DataError, match=r"^memory://no/x: no token files there; allowed: the prefix of a pair"):
        find_tokens("memory://no/x")


def test_reading_that_fails_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/corpus/x.jsonl", b'{"text": "a"}\n')
    opened = open_files("memory://corpus/x.jsonl")
    assert isinstance(opened, Sequential)

    class Cut(fsspec.implementations.memory.MemoryFile):
        def read(self, size: int | None = -1) -> bytes:
            raise TimeoutError("no answer")

    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem, "open", lambda self, path, mode: Cut(self, path, b"x")
    )
    with pytest.raises(DataError) as error:
        list(opened.records(0))
    assert str(error.value) == f"memory://corpus/x.jsonl: cannot be read (TimeoutError: no answer); {MEND}"
