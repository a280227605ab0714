"""Token files as a source: what happens when they change, several at one path, other processes, storage."""

import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from components.data.documents import RandomAccess
from components.data.splits import TokenSlice
from components.data.token_files import TokenFiles, open_tokens
from components.data.token_paths import is_tokens
from components.data.token_shards import Marks
from components.data.token_writer import IndexedWriter
from components.runtime.errors import DataError

RESTORE = "restore the file as it was"


def write(prefix: Path | str, *documents: list[int]) -> str:
    with IndexedWriter(prefix, np.uint16, overwrite=True) as writer:
        ids = np.concatenate([np.empty(0, np.int64), *(np.array(x, np.int64) for x in documents)])
        writer.add_documents(ids, [len(x) for x in documents])
    return str(prefix)


def everything(files: TokenFiles) -> list[list[int]]:
    return [files.document(i).tolist() for i in range(len(files))]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "was truncated from {size} to {half} bytes while the run read it"),
    "emptied": (empty, "was truncated from {size} to 0 bytes while the run read it"),
    "replaced": (replace, "was replaced by another while the run read it"),
    "rewritten": (touch, "was written to while the run read it"),
    "removed": (Path.unlink, "has vanished while the run read it"),
}


@pytest.mark.parametrize("opened", [True, False], ids=["mapped", "not yet mapped"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_an_error(tmp_path: Path, change: str, suffix: str, opened: bool) -> None:
    # large enough that what is cut off are whole pages: touching them would kill the process
    prefix = write(tmp_path / "a", *[[i % 1000] * 20 for i in range(5000)])
    files = open_tokens(prefix)
    if opened:
        files.document(4999)
    else:
        files = pickle.loads(pickle.dumps(files))
    path = Path(prefix + suffix)
    size = path.stat().st_size
    do, text = CHANGES[change]
    do(path)
    with pytest.raises(DataError) as caught:
        files.document(4999)
    assert str(caught.value) == f"{path}: {text.format(size=size, half=size // 2)}; {RESTORE}"
    for read in (lambda: files.read_sequence(4999, 3, 2), files.check, TokenSlice(files, 0, 1).check):
        with pytest.raises(DataError):
            read()
    if suffix == ".idx":
        with pytest.raises(DataError):
            _ = files.lengths


def test_copies_read_the_same_and_carry_no_arrays(tmp_path: Path) -> None:
    files = open_tokens(write(tmp_path / "a", *[[i] for i in range(10000)]))
    assert files.lengths.sum() == 10000
    files.document(0)
    raw = pickle.dumps(files)
    assert len(raw) < 4000
    copy = pickle.loads(raw)
    assert copy.document(9999).tolist() == [9999]
    assert copy.fingerprint == files.fingerprint


def _sum(files: TokenFiles, results: "multiprocessing.SimpleQueue[int]") -> None:
    results.put(sum(int(files.document(i).sum()) for i in range(len(files))))


def test_forked_readers(tmp_path: Path) -> None:
    files = open_tokens(write(tmp_path / "a", *[[i] for i in range(100)]))
    files.document(0)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_sum, args=(files, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get() for _ in workers] == [4950, 4950]
    for worker in workers:
        worker.join()


def test_several_prefixes_are_one_source(tmp_path: Path) -> None:
    write(tmp_path / "b", [3], [4, 5])
    write(tmp_path / "a", [1, 1], [], [2])
    write(tmp_path / "deep" / "c", [6])
    write(tmp_path / ".hidden" / "d", [7])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "report.json").write_text("{}")
    files = open_tokens(str(tmp_path))
    assert everything(files) == [[1, 1], [], [2], [3], [4, 5], [6]]
    assert files.lengths.tolist() == [2, 0, 1, 1, 2, 1]
    assert files.sequence_lengths.tolist() == [2, 1, 1, 2, 1]
    assert files.boundaries.tolist() == [0, 1, 1, 2, 3, 4, 5]
    assert [files.read_sequence(i).tolist() for i in range(5)] == [[1, 1], [2], [3], [4, 5], [6]]
    assert files.place(4) == f"{tmp_path}/b: document 1"
    assert isinstance(files, RandomAccess)
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"no number {index} among 6"):
            files.document(index)


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    for i in range(100):
        write(tmp_path / f"{i:03}", [i, i + 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(100, 2 * in_use), hard))
    try:
        files = open_tokens(str(tmp_path))
        for i in (*range(100), *range(100)):
            assert files.document(i).tolist() == [i, i + 1]
        assert files.lengths.tolist() == files.sequence_lengths.tolist() == [2] * 100
        assert len(files.content_key) == 32
        files.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("path", ["a", "a.bin", "a.idx", "./a", "?", "[ab].*", "*.idx", "a*"])
def test_paths_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    write("a", [1, 2])
    if path == "?":
        path = "a.???"
    assert is_tokens(path)
    assert everything(open_tokens(path)) == [[1, 2]]
    assert everything(open_tokens(f"file://{tmp_path}/a")) == [[1, 2]]


def test_a_prefix_goes_before_a_folder_of_its_name(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [1])
    write(tmp_path / "a" / "cache", [2])
    assert everything(open_tokens(prefix)) == [[1]]


def test_what_is_token_files(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("{}")
    shutil.copytree(tmp_path / "text", tmp_path / "both")
    (tmp_path / "both" / "a.bin").write_bytes(bytes(8))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.bin").write_bytes(bytes(8))
    write(tmp_path / "pairs" / "a", [1])
    (tmp_path / "pairs" / "a.jsonl").write_text("{}")
    found = {x: is_tokens(str(tmp_path / x)) for x in ("text", "both", "shards", "pairs", "pairs/a", "text/a.jsonl")}
    assert found == {
        "text": False,
        "both": False,
        "shards": True,
        "pairs": True,
        "pairs/a": True,
        "text/a.jsonl": False,
    }
    assert not is_tokens("owner/name")
    with pytest.raises(DataError, match=r"text: no token files there; allowed: the prefix of a pair \.bin and \.idx"):
        open_tokens(str(tmp_path / "text"))


def test_a_lost_index_among_others_is_no_shard(tmp_path: Path) -> None:
    write(tmp_path / "a", [1])
    write(tmp_path / "b", [2])
    (tmp_path / "b.idx").unlink()
    with pytest.raises(DataError, match=r"b\.idx: no such file; token files are a pair"):
        open_tokens(str(tmp_path))


def test_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: no tokens in 1 file\(s\); give a dataset that is not empty"):
        open_tokens(write(tmp_path / "a"))


def write_pairs(prefix: Path, first: np.ndarray, lengths: np.ndarray) -> str:
    with IndexedWriter(prefix, np.uint16, overwrite=True) as writer:
        writer.add_documents(np.stack([first, np.full_like(first, 7)], axis=1).ravel(), lengths)
    return str(prefix)


def test_content_key_follows_the_content(tmp_path: Path) -> None:
    first, lengths = np.arange(200_000) % 500, np.full(200_000, 2)  # 800 kB, of which a third is looked at
    key = open_tokens(write_pairs(tmp_path / "a", first, lengths)).content_key
    assert open_tokens(write_pairs(tmp_path / "deep" / "other", first, lengths)).content_key == key
    other_tokens = write_pairs(tmp_path / "a", (first + 1) % 500, lengths)
    assert open_tokens(other_tokens).content_key != key
    other_border = write_pairs(tmp_path / "a", first, np.concatenate([[3, 1], lengths[2:]]))
    assert open_tokens(other_border).content_key != key
    files = open_tokens(write_pairs(tmp_path / "a", first, lengths))
    assert files.fingerprint == {"documents": 200_000, "tokens": 400_000, "digest": key}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """A pair and a shard in storage."""
    write(tmp_path / "a", [1, 2, 3], [], [4])
    write(tmp_path / "b", [5])
    store = fsspec.filesystem("memory")
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        store.pipe_file(f"/tokens/{name}", (tmp_path / name).read_bytes())
    store.pipe_file("/shards/s.bin", np.array([1, 9, 2, 9], np.uint16).tobytes())
    yield "memory://"
    for folder in ("/tokens", "/shards"):
        store.rm(folder, recursive=True)


def test_storage(tmp_path: Path, memory: str) -> None:
    for path in ("tokens/a", "tokens/a.bin", "tokens/a.idx", "tokens/a.*"):
        files = open_tokens(f"{memory}{path}" if "*" not in path else f"{memory}/{path}")
        assert everything(files) == [[1, 2, 3], [], [4]]
        assert files.read(0, 1, 1).tolist() == [2]
        assert files.content_key == open_tokens(str(tmp_path / "a")).content_key
        assert everything(pickle.loads(pickle.dumps(files))) == [[1, 2, 3], [], [4]]
    assert everything(open_tokens(f"{memory}tokens")) == [[1, 2, 3], [], [4], [5]]
    assert everything(open_tokens(f"{memory}shards", Marks(9))) == [[1, 9], [2, 9]]
    assert is_tokens(f"{memory}tokens/a")
    assert is_tokens(f"{memory}shards")
    assert not is_tokens(f"{memory}nothing")


def test_storage_that_changes(memory: str) -> None:
    files = open_tokens(f"{memory}tokens/a")
    store = fsspec.filesystem("memory")
    store.pipe_file("/tokens/a.bin", bytes(4))
    with pytest.raises(DataError, match=r"tokens/a\.bin: was truncated from 8 to 4 bytes while the run read it"):
        files.document(0)
    store.rm("/tokens/a.bin")
    with pytest.raises(DataError, match=r"tokens/a\.bin: has vanished while the run read it"):
        files.document(0)
    with pytest.raises(DataError, match=r"tokens/a\.bin: no such file; token files are a pair"):
        open_tokens(f"{memory}tokens/a")
