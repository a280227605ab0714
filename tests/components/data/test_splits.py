"""Shares of documents: Megatron-LM's rounding, and what of token files stays visible through a slice."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data.shares import is_shares, parse_shares, share_bounds
from components.data.splits import Slice, TokenSlice, take_share, take_tokens
from components.data.token_files import TokenFiles, open_tokens
from components.data.token_writer import IndexedWriter
from components.runtime.errors import ConfigError

KEY = "data.sources[0].split"


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ("98,1,1", 1000, [(0, 980), (980, 990), (990, 1000)]),
        ("969,30,1", 1234, [(0, 1196), (1196, 1233), (1233, 1234)]),
        ("1,1", 5, [(0, 2), (2, 5), (5, 5)]),  # 2.5 goes to the even number
        ("1,1", 7, [(0, 4), (4, 7), (7, 7)]),  # and so does 3.5
        ("100", 3, [(0, 3), (3, 3), (3, 3)]),
        ("0.9, 0.05, 0.05", 10, [(0, 9), (9, 10), (10, 10)]),  # 9.5 goes to 10
        ("0,1,0", 4, [(0, 0), (0, 4), (4, 4)]),
    ],
)
def test_bounds(split: str, count: int, bounds: list[tuple[int, int]]) -> None:
    assert [share_bounds(split, part, count, KEY) for part in range(3)] == bounds


@given(
    shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any),
    count=st.integers(0, 10**9),
)
def test_parts_are_everything_once(shares: list[int], count: int) -> None:
    split = ",".join(map(str, shares))
    bounds = [share_bounds(split, part, count, KEY) for part in range(3)]
    assert bounds[0][0] == 0
    assert bounds[2][1] == count
    assert [x[1] for x in bounds[:2]] == [x[0] for x in bounds[1:]]
    assert all(a <= b for a, b in bounds)


def test_shares_are_divided_by_their_sum() -> None:
    assert parse_shares("98,1,1", KEY) == [0.98, 0.01, 0.01]
    assert parse_shares("3,1", KEY) == [0.75, 0.25, 0.0]


ALLOWED = 'allowed: up to three numbers, not negative and not all 0, such as "98,1,1"'


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ("98,x,1", "not shares"),
        ("98,,1", "not shares"),
        ("98 1 1", "not shares"),
        ("1,2,3,4", "4 shares"),
        ("-1,2", "no shares of a whole"),
        ("0,0,0", "no shares of a whole"),
        ("inf,1", "no shares of a whole"),
        ("nan,1", "no shares of a whole"),
    ],
)
def test_what_are_no_shares(split: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_shares(split, KEY)
    assert str(caught.value) == f"{KEY} = {split!r}: {what}; {ALLOWED}"


def test_shares_are_told_from_names() -> None:
    assert [is_shares(x) for x in ("98,1,1", "1", ".5,.5", "-1,2", "a,b")] == [True] * 5
    assert [is_shares(x) for x in ("train", "train_sft", "", "test[:10]")] == [False] * 4


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFiles:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for document in ([[1, 2]], [], [[3], [4, 5]], [[6]], [[7], [8], [9]]):
            writer.add_document([x for y in document for x in y], [len(x) for x in document])
    return open_tokens(str(tmp_path / "a"))


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 2), (1, 4), (2, 3), (4, 5), (1, 2)])
def test_slices_of_token_files(tokens: TokenFiles, start: int, stop: int) -> None:
    part = TokenSlice(tokens, start, stop)
    documents = [[1, 2], [], [3, 4, 5], [6], [7, 8, 9]][start:stop]
    for copy in (part, pickle.loads(pickle.dumps(part))):
        assert [copy.document(i).tolist() for i in range(len(copy))] == documents
        assert [copy.read(i, 1, 1).tolist() for i in range(len(copy))] == [x[1:2] for x in documents]
        assert copy.lengths.tolist() == [len(x) for x in documents]
    assert part.place(0) == tokens.place(start)
    assert part.content_key == f"{tokens.content_key} documents {start}:{stop}"
    assert part.fingerprint == tokens.fingerprint | {"slice": [start, stop]}
    for index in (-1, len(part)):
        with pytest.raises(IndexError, match=f"no document {index} among {len(part)}"):
            part.document(index)


class Letters:
    fingerprint = {"letters": 4}  # noqa: RUF012 - a source's attribute

    def __len__(self) -> int:
        return 4

    def document(self, index: int) -> str:
        return "abcd"[index]


def test_shares_of_a_source(tokens: TokenFiles) -> None:
    for sequences, whole, held_out in (
        (False, [[1, 2], [], [3, 4, 5], [6], [7, 8, 9]], [[6], [7, 8, 9]]),
        (True, [[1, 2], [3], [4, 5], [6], [7], [8], [9]], [[7], [8], [9]]),
    ):
        for split, expected in ((None, whole), ("60,40", held_out)):
            part = take_tokens(tokens, split, 1, KEY, sequences=sequences)
            assert [part.read(i).tolist() for i in range(len(part))] == expected
    for sequences, count in ((False, "5 documents"), (True, "7 sequences")):
        with pytest.raises(ConfigError) as caught:
            take_tokens(tokens, "60,40", 2, KEY, sequences=sequences)
        assert str(caught.value) == f"{KEY} = '60,40': test gets none of {count}; give it a larger share"
    text = take_share(Letters(), "3,1", 1, KEY)
    assert type(text) is Slice
    assert [text.document(i) for i in range(len(text))] == ["d"]
    assert text.place(0) == "document 3 of the dataset, counted from 0"
    assert text.fingerprint == {"letters": 4, "slice": [3, 4]}
