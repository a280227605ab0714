"""Token files joined, divided and looked at: the bytes and numbers of obvious versions."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from components.data.preprocess import pieces
from components.data.preprocess.job import open_tokenizer, preprocess
from components.data.preprocess.looking import head, stats, table
from components.data.preprocess.pieces import Made, merge, split_documents, split_shares
from components.data.token_writer import IndexedWriter
from components.runtime.errors import ConfigError, DataError
from tests.components.data.preprocessing import TOKENIZER, corpus, expected, options, write, written

RECORDS = corpus(50)


def made(tmp_path: Path, name: str, start: int, stop: int, key: str = "title") -> str:
    """Token files of some of the records, documents of several sequences and empty ones among them."""
    preprocess(options(tmp_path / name, write(tmp_path / f"{name}.jsonl", RECORDS[start:stop]), keys=(key,)), 0)
    return f"{tmp_path}/{name}_{key}_document"


def test_merged_files_are_those_of_the_joined_text(tmp_path: Path) -> None:
    parts = [made(tmp_path, "a", 0, 20), made(tmp_path, "b", 20, 20), made(tmp_path, "c", 20, 50)]
    result = merge([parts[0], f"{parts[1]}.idx", f"{parts[2]}.bin"], str(tmp_path / "all"))
    assert written(tmp_path / "all") == expected(RECORDS, "title")
    assert result == Made(str(tmp_path / "all"), 50, len(expected(RECORDS, "title")[0]) // 2)


def test_merging_refuses_other_dtypes_damage_and_what_is_there(tmp_path: Path) -> None:
    narrow, wide = made(tmp_path, "a", 0, 20), str(tmp_path / "wide")
    with IndexedWriter(wide, np.int32) as writer:
        writer.add_document([1, 2])
    with pytest.raises(DataError) as caught:
        merge([narrow, wide], str(tmp_path / "all"))
    assert str(caught.value) == (f"{wide}: holds int32, {tmp_path}/all gets uint16; put together files of one kind")
    assert not list(tmp_path.glob("all*"))
    with pytest.raises(DataError, match=r"a_title_document\.bin: is there already"):
        merge([wide], narrow)
    merge([wide], narrow, overwrite=True)
    assert written(narrow) == written(wide)


@pytest.mark.parametrize("limit", [1, 40, 1 << 24])
def test_pieces_of_so_many_documents(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BYTES", limit)
    whole = made(tmp_path, "a", 0, 50)
    results = split_documents(whole, str(tmp_path / "piece"), 15)
    assert [x.documents for x in results] == [15, 15, 15, 5]
    for i, result in enumerate(results):
        assert result.prefix == f"{tmp_path}/piece_{i:05d}"
        assert written(result.prefix) == expected(RECORDS[15 * i : 15 * i + 15], "title")
    merge([x.prefix for x in results], str(tmp_path / "again"))
    assert written(tmp_path / "again") == written(whole)


def test_no_piece_of_an_earlier_split_stays_beside_the_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder or a glob of the pieces would read its documents twice. Only what a split may have written goes."""
    whole, output = made(tmp_path, "a", 0, 50), str(tmp_path / "pieces/x")
    assert len(split_documents(whole, output, 10)) == 5
    others = ["x_00004.bin.bak", "x_00007.bin", "x_000005.bin", "x_000005.idx", "y_00004.bin", "y_00004.idx", "x_a.idx"]
    for name in others:
        (tmp_path / "pieces" / name).write_text(name)
    new = [f"x_{i:05d}{suffix}" for i in range(3) for suffix in (".bin", ".idx")]
    for name in new:
        (tmp_path / "pieces" / name).unlink()
    with pytest.raises(DataError) as caught:
        split_documents(whole, output, 20)
    assert str(caught.value) == (
        f"{output}_00003.bin: is of an earlier split and would follow the last new piece; choose another --output, or"
        " have such pieces removed with --overwrite"
    )
    assert len(list((tmp_path / "pieces").glob("x_0000?.bin"))) == 3
    results = split_documents(whole, output, 20, overwrite=True)
    assert [x.documents for x in results] == [20, 20, 10]
    assert sorted(x.name for x in (tmp_path / "pieces").iterdir()) == sorted(new + others)
    assert [x.getMessage() for x in caplog.records] == [
        f"{output}_{i}: removed, a piece of an earlier split that would follow the new ones" for i in ("00003", "00004")
    ]


def test_a_piece_that_is_divided_itself_is_not_removed(tmp_path: Path) -> None:
    whole, output = made(tmp_path, "a", 0, 50), str(tmp_path / "x")
    last = split_documents(whole, output, 10)[-1].prefix
    before = written(last)
    with pytest.raises(DataError) as caught:
        split_documents(f"{last}.idx", output, 5, overwrite=True)
    assert str(caught.value) == (
        f"--output {output}: {last} is what shall be divided, and would be replaced or removed; choose another --output"
    )
    assert written(last) == before


def test_shares_are_those_that_the_trainer_takes(tmp_path: Path) -> None:
    whole = made(tmp_path, "a", 0, 50)
    names = ("training", "validation", "test")
    results = split_shares(whole, str(tmp_path / "a"), "90,5,5", names)
    assert [x.documents for x in results] == [45, 3, 2]
    for result, (start, stop), name in zip(results, [(0, 45), (45, 48), (48, 50)], names, strict=True):
        assert result.prefix == f"{tmp_path}/a_{name}"
        assert written(result.prefix) == expected(RECORDS[start:stop], "title")
    with pytest.raises(DataError) as caught:
        split_shares(whole, str(tmp_path / "a"), "1,1", names)
    assert str(caught.value) == (
        f"{tmp_path}/a_training.bin: is there already; choose another --output, or replace it with --overwrite"
    )
    for shares in ("x", "1,1,1,1", "0,0"):
        with pytest.raises(ConfigError, match=r"^--shares = "):
            split_shares(whole, str(tmp_path / "b"), shares, ("a", "b", "c", "d"))
    with pytest.raises(DataError) as caught:
        split_shares(whole, str(tmp_path / "b"), "1,1", ("a", "a"))
    assert str(caught.value) == "--names a,a: give 2 different names, one for each share"
    with pytest.raises(DataError) as caught:
        split_documents(whole, str(tmp_path / "b"), 0)
    assert str(caught.value) == "--documents 0: give a number from 1 on"
    assert not list(tmp_path.glob("b*"))


def test_files_of_no_tokens_can_be_divided_and_looked_at(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "none", np.uint16) as writer:
        writer.add_documents(np.empty(0, np.uint16), [], [0, 0, 0])
    assert [x.documents for x in split_documents(str(tmp_path / "none"), str(tmp_path / "x"), 2)] == [2, 1]
    found = stats(str(tmp_path / "x_00000"), validate=True)
    assert (found["tokens"], found["ids"]) == (0, {"min": None, "max": None})
    assert table(found).splitlines()[-1] == "ids: min n/a, max n/a"
    with IndexedWriter(tmp_path / "nothing", np.uint16):
        pass
    assert split_documents(str(tmp_path / "nothing"), str(tmp_path / "y"), 2) == []
    assert stats(str(tmp_path / "nothing"))["documents"] == 0
    assert list(head(str(tmp_path / "nothing"), 3)) == []


def test_stats(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for length in range(100, -1, -1):
            writer.add_document(list(range(length)))
    found = stats(str(tmp_path / "a.idx"), validate=True)
    size = sum((tmp_path / f"a{x}").stat().st_size for x in (".bin", ".idx"))
    length = {
        "mean": 50.0,
        "min": 0,
        "p1": 1,
        "p5": 5,
        "p25": 25,
        "p50": 50,
        "p75": 75,
        "p95": 95,
        "p99": 99,
        "max": 100,
    }
    assert found == {
        "documents": 101,
        "empty_documents": 1,
        "sequences": 100,
        "tokens": 5050,
        "dtype": "uint16",
        "bytes": size,
        "length": length,
        "ids": {"min": 0, "max": 99},
    }
    assert json.loads(json.dumps(found)) == found
    assert table(found).splitlines()[:5] == [
        "documents: 101", "empty documents: 1", "sequences: 100", "tokens: 5,050", "dtype: uint16"
    ]  # fmt: skip


def test_ids_beyond_the_vocabulary_are_told(tmp_path: Path) -> None:
    prefix = str(tmp_path / "a")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([3, 2048])
    told = f"{prefix}: token ids from 3 to 2048; the vocabulary has 0 to 2047: made with another tokenizer?"
    tokenizer = open_tokenizer(str(TOKENIZER))
    for look in (lambda: stats(prefix, validate=True, tokenizer=tokenizer), lambda: list(head(prefix, 1, tokenizer))):
        with pytest.raises(DataError) as caught:
            look()
        assert str(caught.value) == told
    assert stats(prefix, validate=True)["ids"] == {"min": 3, "max": 2048}
    (tmp_path / "a.bin").write_bytes(struct.pack("<H", 3))
    with pytest.raises(DataError, match=r"a\.bin: shorter than its index says"):
        stats(prefix)


def test_head_shows_ids_and_text(tmp_path: Path) -> None:
    prefix = made(tmp_path, "a", 0, 50, "text")
    ids = np.frombuffer(expected(RECORDS[:2])[0], "<u2").tolist()
    shown = list(head(prefix, 2, open_tokenizer(str(TOKENIZER))))
    assert shown == [
        "document 0: 0 tokens: ",
        "",
        f"document 1: {len(ids)} tokens: {' '.join(map(str, ids))}",
        RECORDS[1]["text"] + "<|end_of_text|>",
    ]
    assert len(list(head(prefix, 1000))) == 50
