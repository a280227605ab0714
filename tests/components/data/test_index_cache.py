"""The cache of indices: what it is keyed by, what it survives, and that many may use it at once."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from components.data import index_cache
from components.data.index_cache import Arrays, IndexCache, default_folder
from components.data.native_rows import NativeRows
from components.data.splits import TokenSlice
from components.data.token_files import open_tokens
from components.data.token_rows import TokenSource
from components.runtime.logging import logger
from tests.components.data.token_sources import write_tokens


class Builder:
    """Counts how often it builds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"a": np.arange(12, dtype=np.int32).reshape(3, 4), "b": np.empty(0, np.int64), "c": np.array([7.5])}


def _same(found: Arrays) -> None:
    for name, array in Builder()().items():
        assert found[name].dtype == array.dtype
        assert found[name].tolist() == array.tolist()
        assert not found[name].flags.writeable


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told, as it is told."""
    told: list[str] = []
    monkeypatch.setattr(logger, "info", told.append)
    return told


def _one(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_what_is_kept_is_mapped_and_not_built_again(tmp_path: Path) -> None:
    build = Builder()
    first = IndexCache(tmp_path / "deep" / "er").arrays("kind", {"x": 1}, build)
    again = IndexCache(tmp_path / "deep" / "er").arrays("kind", {"x": 1}, build)
    assert build.calls == 1
    for found in (first, again):
        _same(found)
        assert found["a"].base is not None  # of a mapping, whose pages all processes share
    entry = _one(tmp_path / "deep" / "er")
    assert entry.name.startswith("kind-")
    assert sorted(x.name for x in entry.iterdir()) == ["a.npy", "b.npy", "c.npy", "index.json"]
    assert json.loads((entry / "index.json").read_text())["of"]["key"] == {"x": 1}


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    build, cache = Builder(), IndexCache(tmp_path)
    for kind, key in (("a", {"x": 1}), ("a", {"x": 2}), ("b", {"x": 1}), ("a", {"x": 1, "y": 1}), ("a", {"x": 1})):
        cache.arrays(kind, key, build)
    assert build.calls == 4


def test_another_rule_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    IndexCache(tmp_path).arrays("a", {}, build)
    monkeypatch.setattr(index_cache, "FORMAT", index_cache.FORMAT + 1)
    IndexCache(tmp_path).arrays("a", {}, build)
    assert build.calls == 2


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def _shape(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"(3, 4)", b"(4, 3)"))


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.npy", _cut),
        ("a.npy", _flip),
        ("a.npy", _shape),
        ("a.npy", _empty),
        ("a.npy", Path.unlink),
        ("index.json", _cut),
        ("index.json", _empty),
        ("index.json", Path.unlink),
        ("index.json", lambda x: x.write_text("[]")),
        ("index.json", lambda x: x.write_text('{"arrays": 3}')),
        ("index.json", lambda x: x.write_text('{"arrays": {}}')),
        ("index.json", lambda x: x.write_text("[" * 100_000)),
        ("index.json", lambda x: x.write_bytes(b'{"\xff": 1}')),
        ("index.json", lambda x: _edit(x, arrays={})),
        ("index.json", lambda x: _edit(x, arrays={"../a": {}})),
        ("index.json", lambda x: _edit(x, digest=3)),
        ("index.json", lambda x: _edit(x, of={})),
        ("index.json", _folder),
        ("a.npy", _folder),
    ],
)
def test_a_damaged_entry_is_built_anew(tmp_path: Path, name: str, damage: Any, messages: list[str]) -> None:
    build = Builder()
    IndexCache(tmp_path).arrays("x", {}, build)
    damage(_one(tmp_path) / name)
    _same(IndexCache(tmp_path).arrays("x", {}, build))
    assert build.calls == 2
    assert messages == [f"{_one(tmp_path)}: damaged; built anew"]
    _same(IndexCache(tmp_path).arrays("x", {}, build))
    assert build.calls == 2


def test_no_byte_is_believed_that_was_changed(tmp_path: Path) -> None:
    IndexCache(tmp_path / "whole").arrays("x", {}, Builder())
    raws = {x.name: x.read_bytes() for x in _one(tmp_path / "whole").iterdir()}
    rng, build = Random(1), Builder()
    for i in range(120):
        name = rng.choice(sorted(raws))
        at, raw = rng.randrange(len(raws[name])), bytearray(raws[name])
        raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        (_one(tmp_path / "damaged") / name).write_bytes(raw)
        _same(IndexCache(tmp_path / "damaged").arrays("x", {}, build))
        shutil.rmtree(tmp_path / "damaged")
        assert (build.calls == i + 1) or raw == raws[name] or name == "index.json"
        build.calls = i + 1


def test_an_entry_under_the_name_of_another_is_not_believed(tmp_path: Path) -> None:
    build, cache = Builder(), IndexCache(tmp_path)
    cache.arrays("x", {"x": 1}, build)
    first = _one(tmp_path)
    cache.arrays("x", {"x": 2}, lambda: {"a": np.arange(3)})
    (second,) = set(tmp_path.iterdir()) - {first}
    shutil.rmtree(first)
    second.rename(first)
    _same(cache.arrays("x", {"x": 1}, build))
    assert build.calls == 2


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    build = Builder()
    IndexCache(tmp_path).arrays("x", {}, build)
    np.save(_one(tmp_path) / "a.npy", np.array([print], object), allow_pickle=True)
    _same(IndexCache(tmp_path).arrays("x", {}, build))
    assert build.calls == 2


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, messages: list[str]) -> None:
    (tmp_path / "file").touch()
    build, cache = Builder(), IndexCache(tmp_path / "file" / "folder")
    for x in range(3):
        _same(cache.arrays("x", {"x": x}, build))
    assert build.calls == 3
    assert messages == [
        f"{tmp_path}/file/folder: cannot be written (Not a directory): indices of token files are not kept, and built"
        " by each process; set data.cache_folder"
    ]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    save = np.save

    def fail(path: Path, array: np.ndarray, allow_pickle: bool) -> None:
        if path.name == "b.npy":
            raise OSError(28, "No space left on device")
        save(path, array, allow_pickle=allow_pickle)

    monkeypatch.setattr(np, "save", fail)
    _same(IndexCache(tmp_path).arrays("x", {}, Builder()))
    assert list(tmp_path.iterdir()) == []
    assert len(messages) == 1
    assert messages[0].startswith(f"{tmp_path}: cannot be written (No space left on device): ")


def test_the_error_of_a_build_passes(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        IndexCache(tmp_path).arrays("x", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_whoever_is_second_takes_what_is_there(tmp_path: Path, messages: list[str]) -> None:
    def build_late() -> Arrays:
        IndexCache(tmp_path).arrays("x", {}, Builder())  # another process, meanwhile
        return Builder()()

    found = IndexCache(tmp_path).arrays("x", {}, build_late)
    _same(found)
    assert found["a"].base is not None
    assert [x.name.startswith("x-") for x in tmp_path.iterdir()] == [True]
    assert messages == []


def test_an_entry_that_goes_away_is_still_in_memory(tmp_path: Path) -> None:
    found = IndexCache(tmp_path).arrays("x", {}, Builder())
    shutil.rmtree(tmp_path)
    _same(found)


def _many(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put([int(IndexCache(folder).arrays("x", {"x": i}, Builder())["a"].sum()) for i in range(20)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_many_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    started = [context.Process(target=_many, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in started:
        process.start()
    assert [results.get(timeout=60) for _ in started] == [[66] * 20] * 4
    for process in started:
        process.join()
    assert [x.name[:2] for x in tmp_path.iterdir()] == ["x-"] * 20


@pytest.mark.parametrize(
    ("xdg", "home", "expected"),
    [
        ("/cache", "/home/x", Path("/cache/espalier/indices")),
        ("", "/home/x", Path("/home/x/.cache/espalier/indices")),
        ("relative", "/home/x", Path("/home/x/.cache/espalier/indices")),
    ],
)
def test_default_folder(xdg: str, home: str, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", home)
    assert default_folder() == expected


def test_no_cache_folder_at_all(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry, and no HOME
    assert default_folder() is None
    _same(IndexCache().arrays("x", {}, Builder()))
    assert messages[0].startswith("this user has no cache folder: indices of token files are not kept")


def test_files_of_the_same_size_and_time_but_another_content_have_another_index(tmp_path: Path) -> None:
    def rows() -> NativeRows:
        files = open_tokens(str(tmp_path / "x"))
        part = TokenSource("x", TokenSlice(files, 0, len(files)))
        return NativeRows([part], seq_len=4, rows=9, seed=1, ending="stop", cache=IndexCache(tmp_path / "cache"))

    write_tokens(tmp_path / "x", [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]])
    times = {x: (tmp_path / x).stat() for x in ("x.bin", "x.idx")}
    assert rows().count == 2
    before = [rows().row(n)[1].tolist() for n in range(2)]
    for name in times:
        (tmp_path / name).unlink()
    write_tokens(tmp_path / "x", [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]])  # the same tokens in other documents
    for name, old in times.items():
        os.utime(tmp_path / name, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert (tmp_path / name).stat().st_size == old.st_size
    assert [rows().row(n)[1].tolist() for n in range(2)] != before
    assert len(list((tmp_path / "cache").iterdir())) == 2
