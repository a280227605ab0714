"""A file that is hashed while it is written has the hashes of one that is read."""

import random
from functools import partial
from pathlib import Path

import pytest
import xxhash

from components.checkpoint.hashing import ChunkHasher, chunk_count, hash_chunks
from components.checkpoint.local import LocalFolder
from components.checkpoint.manifest import FileEntry

DATA = random.Random(0).randbytes(1000)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("piece", [1, 7, 64, 100, 1000])
def test_writing_and_reading_hash_alike(tmp_path: Path, size: int, piece: int) -> None:
    hasher = ChunkHasher(64)
    for start in range(0, size, piece):
        hasher.update(memoryview(DATA)[start : min(start + piece, size)])
    expected = [xxhash.xxh3_128(DATA[start : min(start + 64, size)]).hexdigest() for start in range(0, size, 64)]
    assert (hasher.size, hasher.hashes()) == (size, expected)
    (tmp_path / "file").write_bytes(DATA[:size])
    chunks = [(partial(LocalFolder(tmp_path).open, "file"), index) for index in range(chunk_count(size, 64))]
    assert hash_chunks(chunks, 64) == expected


def test_a_file_knows_what_was_written(tmp_path: Path) -> None:
    with LocalFolder(tmp_path).create("file") as file:
        assert file.write(DATA[:10]) == 10
        file.write(memoryview(DATA)[10:18])
        assert file.tell() == 18
    assert file.entry == FileEntry("file", 18, [xxhash.xxh3_128(DATA[:18]).hexdigest()])
    assert (tmp_path / "file").read_bytes() == DATA[:18]
    with pytest.raises(FileExistsError):
        LocalFolder(tmp_path).create("file")
