"""Token files without an index: where documents lie, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import token_shards
from components.data.token_files import Marks, TokenFiles, open_tokens
from components.runtime.errors import DataError

END = 9


def raw(path: Path, tokens: list[int], dtype: type = np.uint16) -> Path:
    path.write_bytes(np.array(tokens, dtype).tobytes())
    return path


def headed(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, dtype: type = np.uint16) -> Path:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())
    return path


def everything(files: TokenFiles) -> list[list[int]]:
    return [files.document(i).tolist() for i in range(len(files))]


def obvious(tokens: list[int], at: str) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if at == "begin" and token == END:
            found.append([])
        found[-1].append(token)
        if at == "end" and token == END:
            found.append([])
    return [x for x in found if x]


def test_without_header_documents_end_with_the_token(tmp_path: Path) -> None:
    raw(tmp_path / "b.bin", [5, END])
    raw(tmp_path / "a.bin", [1, 2, END, END, 3])
    files = open_tokens(str(tmp_path), Marks(END))
    assert everything(files) == [[1, 2, END], [END], [3], [5, END]]
    assert files.lengths.tolist() == files.sequence_lengths.tolist() == [3, 1, 1, 2]
    assert files.boundaries.tolist() == [0, 1, 2, 3, 4]
    assert files.read(0, 1, 1).tolist() == [2]
    assert files.document(0).dtype == np.int64


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "large"), [(20240520, 1, np.uint16, 50256), (20240801, 7, np.uint32, 128000)]
)
def test_with_header_documents_begin_with_the_token(
    tmp_path: Path, magic: int, version: int, dtype: type, large: int
) -> None:
    path = headed(tmp_path / "a.bin", [END, 1, 2, END, large], magic, version, dtype)
    assert everything(open_tokens(str(path), Marks(END))) == [[END, 1, 2], [END, large]]
    assert everything(open_tokens(str(path), Marks(END, at="end"))) == [[END], [1, 2, END], [large]]
    assert everything(open_tokens(str(path))) == [[END, 1, 2, END, large]]


def test_tokens_of_32_bits_are_told_by_their_zeros(tmp_path: Path) -> None:
    tokens = [1, 2, END, 0, 65535]
    path = raw(tmp_path / "a.bin", tokens, np.uint32)
    assert everything(open_tokens(str(path), Marks(END))) == [[1, 2, END], [0, 65535]]
    narrow = open_tokens(str(path), Marks(dtype="uint16"))
    assert narrow.document(0).tolist() == [1, 0, 2, 0, END, 0, 0, 0, 65535, 0]
    wide = raw(tmp_path / "b.bin", [70000, 2], np.uint32)
    assert everything(open_tokens(str(wide), Marks(dtype="uint32"))) == [[70000, 2]]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(7, 10), min_size=1, max_size=40), at=st.sampled_from(["begin", "end"]))
def test_scan_against_an_obvious_version(tmp_path_factory: pytest.TempPathFactory, tokens: list[int], at: str) -> None:
    path = raw(tmp_path_factory.mktemp("shard") / "a.bin", tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "CHUNK", 7)
        marks = Marks(END, at="begin" if at == "begin" else "end", dtype="uint16")
        assert everything(open_tokens(str(path), marks)) == obvious(tokens, at)


def test_an_empty_shard_among_others(tmp_path: Path) -> None:
    raw(tmp_path / "a.bin", [])
    headed(tmp_path / "b.bin", [])
    raw(tmp_path / "c.bin", [1, END])
    assert everything(open_tokens(str(tmp_path), Marks(END))) == [[1, END]]


def test_content_key_knows_the_marks(tmp_path: Path) -> None:
    path = str(raw(tmp_path / "a.bin", [1, END, 2]))
    keys = [open_tokens(path, x).content_key for x in (Marks(), Marks(END), Marks(END, at="begin"), Marks(END))]
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]


def test_a_shard_that_changes(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.bin", [1] * 50000)
    files = open_tokens(str(path))
    assert len(files.document(0)) == 50000
    path.write_bytes(bytes(10))
    with pytest.raises(DataError, match=r"a\.bin: was truncated from 100000 to 10 bytes while the run read it"):
        files.document(0)


def test_what_is_refused(tmp_path: Path) -> None:
    path = headed(tmp_path / "a.bin", [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError) as caught:
        open_tokens(str(path))
    assert str(caught.value) == (
        f"{path}: the header says 2 tokens of uint16, which take 1028 bytes with it, but the file has 1026;"
        " copy it again from where it is whole"
    )
    path.write_bytes(whole[:8] + b"\xff\xff\xff\x7f" + whole[12:])
    with pytest.raises(DataError, match=r"the header says 2147483647 tokens of uint16"):
        open_tokens(str(path))
    headed(path, [1], version=2)
    with pytest.raises(DataError, match=r"a\.bin: version 2 of llm\.c's header 20240520; only 1 is known"):
        open_tokens(str(path))
    headed(path, [1], magic=20240522)
    with pytest.raises(DataError, match=r"a\.bin: llm\.c's evaluation data \(multiple choice\), not documents"):
        open_tokens(str(path))
    path.write_bytes(b"123")
    with pytest.raises(DataError, match=r"a\.bin: 3 bytes are no whole number of uint16 tokens; it is truncated"):
        open_tokens(str(path))
