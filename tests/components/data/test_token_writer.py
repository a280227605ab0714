"""What the writer leaves behind, whatever happens; and what it refuses."""

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from components.data import token_writer
from components.data.token_files import open_tokens
from components.data.token_writer import IndexedWriter
from components.runtime.errors import DataError


def write(prefix: Path, *documents: list[int], dtype: type = np.uint16, overwrite: bool = False) -> Path:
    with IndexedWriter(prefix, dtype, overwrite=overwrite) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def fail_within(writer: IndexedWriter) -> None:
    with writer:
        writer.add_document([1])
        raise KeyError


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_within(IndexedWriter(tmp_path / "a", np.uint16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_are_there_are_kept(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_text("mine")
    with pytest.raises(DataError) as caught:
        IndexedWriter(tmp_path / "a", np.uint16)
    expected = f"{tmp_path}/a{suffix}: is there already; choose another prefix, or remove both files"
    assert str(caught.value) == expected
    assert [x.name for x in tmp_path.iterdir()] == [f"a{suffix}"]


def test_files_that_appear_meanwhile_are_kept(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.uint16)
    writer.add_document([1])
    write(tmp_path / "a", [2])
    with pytest.raises(DataError, match=r"a\.bin: is there already"):
        writer.finish()
    assert open_tokens(str(tmp_path / "a")).document(0).tolist() == [2]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_overwriting(tmp_path: Path) -> None:
    write(tmp_path / "a", [1])
    write(tmp_path / "a", [2, 3], overwrite=True)
    assert open_tokens(str(tmp_path / "a")).document(0).tolist() == [2, 3]


def test_the_index_comes_last_and_is_never_that_of_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = os.replace

    def replace(source: str, target: str) -> None:
        seen.append((Path(target).name, sorted(x.name for x in tmp_path.iterdir() if x.suffix != ".tmp")))
        rename(source, target)

    monkeypatch.setattr(token_writer.os, "replace", replace)
    write(tmp_path / "a", [1])
    write(tmp_path / "a", [2], overwrite=True)
    assert seen == [("a.bin", []), ("a.idx", ["a.bin"]), ("a.bin", ["a.bin"]), ("a.idx", ["a.bin"])]


def test_killed_writers_leave_no_dataset(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, numpy\n"
        "from components.data.token_writer import IndexedWriter\n"
        "writer = IndexedWriter(sys.argv[1], numpy.uint16)\n"
        "writer.add_documents(numpy.ones(1 << 20, numpy.uint16), [1 << 20])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert all(x.name.endswith(".tmp") for x in tmp_path.iterdir())
    with pytest.raises(DataError, match="no token files there"):
        open_tokens(str(tmp_path / "a"))
    assert open_tokens(str(write(tmp_path / "a", [5]))).document(0).tolist() == [5]


REFUSED = {
    "too large": (lambda x: x.add_document([1, 65536]), "token ids from 1 to 65536, int64; uint16 holds whole numbers"),
    "negative": (lambda x: x.add_document([-1]), "token ids from -1 to -1, int64; uint16 holds whole numbers from 0"),
    "fractions": (lambda x: x.add_document([0.5]), "token ids from 0.5 to 0.5, float64; uint16 holds whole numbers"),
    "lengths": (lambda x: x.add_document([1, 2], [1]), "sequences of 1 tokens in all, but 2 token ids"),
    "negative length": (lambda x: x.add_document([1], [2, -1]), "sequence lengths from -1 to 2; 0 to 2147483647"),
    "documents": (
        lambda x: x.add_documents(np.array([1, 2]), [1, 1], [1]),
        "documents of 1 sequences, but 2 lengths",
    ),
    "modes": (lambda x: x.add_document([1], modes=[1]), "1 modes of sequences; wanted: none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_of_it_written(tmp_path: Path, name: str) -> None:
    call, text = REFUSED[name]
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([4])
        with pytest.raises(DataError) as caught:
            call(writer)
        assert text in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path}/a: document 1")
        writer.add_document([5])
    files = open_tokens(str(tmp_path / "a"))
    assert [files.document(i).tolist() for i in range(2)] == [[4], [5]]


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/a: token files cannot be written \(.*\); check the folder"):
        IndexedWriter(tmp_path / "file" / "a", np.uint16)
    with pytest.raises(DataError, match="s3://b/a: token files are written to local folders only"):
        IndexedWriter("s3://b/a", np.uint16)
    with pytest.raises(DataError, match="a: token files of complex64 cannot be written; allowed: uint8, int8, int16"):
        IndexedWriter(tmp_path / "a", np.complex64)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's."""
    script = (
        "import resource, signal, sys, numpy\n"
        "from components.data.token_writer import IndexedWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "with IndexedWriter(sys.argv[1], numpy.uint16) as writer:\n"
        "    for i in range(8):\n"
        "        writer.add_documents(numpy.ones(1 << 18, numpy.uint16), [1 << 18])\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")], check=False, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        f"components.runtime.errors.DataError: {tmp_path}/a: token files cannot be written (File too large);"
        " check the folder, its permissions and space"
    )
    assert list(tmp_path.iterdir()) == []


def test_files_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2], [3])
    write(tmp_path / "b", [4])
    with IndexedWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_file(tmp_path / "a")
        writer.add_document([], [])
        writer.add_file(tmp_path / "b")
        assert (writer.documents, writer.sequences, writer.tokens) == (4, 3, 4)
    write(tmp_path / "d", [1, 2], [3], [], [4])
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"d{suffix}").read_bytes()
    write(tmp_path / "wide", [4], dtype=np.int32)
    with (
        pytest.raises(DataError, match=r"wide: holds int32, .*/e gets uint16; put together files of one kind"),
        IndexedWriter(tmp_path / "e", np.uint16) as writer,
    ):
        writer.add_file(tmp_path / "wide")


def test_permissions_are_those_of_other_new_files(tmp_path: Path) -> None:
    write(tmp_path / "a", [1])
    (tmp_path / "other").touch()
    assert {(tmp_path / x).stat().st_mode for x in ("a.bin", "a.idx")} == {(tmp_path / "other").stat().st_mode}


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    tracemalloc.start()
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        ids, lengths = np.ones(4096, np.uint16), np.ones(4096, np.int64)
        for _ in range(1000):  # 4 million documents, whose index takes 80 MB
            writer.add_documents(ids, lengths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writer.documents == 4_096_000
    assert peak < 48 << 20
