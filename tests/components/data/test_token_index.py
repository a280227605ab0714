"""Megatron-LM's pair of files, against golden bytes, an obvious version of the format, and every small damage."""

import resource
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.token_files import TokenFiles, open_tokens
from components.data.token_index import DTYPES, token_dtype, validate
from components.data.token_writer import IndexedWriter
from components.runtime.errors import DataError

GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0300000000000000"
    "04000000 02000000 01000000 0000000000000000 0800000000000000 0c00000000000000"
    "0000000000000000 0100000000000000 0300000000000000"
)
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0000 0500 0600 0000")
MEND = "write both files again from the text, or copy both again from where they are whole"

Documents = list[list[list[int]]]
"""Sequences of token ids in documents."""


def write(prefix: Path, documents: Documents, dtype: np.dtype | type = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([x for sequence in document for x in sequence], [len(x) for x in document])
    return prefix


def obvious(documents: Documents, code: int, modes: list[int] | None = None) -> tuple[bytes, bytes]:
    """The two files, token by token as the format's table has them."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    sequences = [x for document in documents for x in document]
    tokens, pointers, starts = b"", [], [0]
    for sequence in sequences:
        pointers.append(len(tokens))
        for token in sequence:
            tokens += struct.pack("<" + letter, token)
    for document in documents:
        starts.append(starts[-1] + len(document))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
    for kind, values in (("i", [len(x) for x in sequences]), ("q", pointers), ("q", starts), ("b", modes or [])):
        for value in values:
            index += struct.pack("<" + kind, value)
    return index, tokens


def contents(files: TokenFiles) -> Documents:
    """Everything in it, read by sequences."""
    bounds = files.boundaries.tolist()
    each = [files.read_sequence(i).tolist() for i in range(files.sequences)]
    return [each[a:b] for a, b in pairwise(bounds)]


def test_golden_bytes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "golden", [[[1, 2, 3, 0]], [[5, 6], [0]]])
    assert (tmp_path / "golden.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "golden.bin").read_bytes() == GOLDEN_BIN
    files = open_tokens(str(prefix))
    assert [files.document(i).tolist() for i in range(len(files))] == [[1, 2, 3, 0], [5, 6, 0]]
    assert files.document(0).dtype == np.int64
    assert (files.lengths.tolist(), files.lengths.dtype) == ([4, 3], np.int64)
    assert (files.sequence_lengths.tolist(), files.sequences, files.tokens) == ([4, 2, 1], 3, 7)
    assert files.read(0, 1, 2).tolist() == [2, 3]
    assert files.read(1, 2, 9).tolist() == [0]
    assert files.read(1, 9).tolist() == []
    assert files.read_sequence(1, 1).tolist() == [6]
    assert files.place(1) == f"{prefix}: document 1"


def test_empty_documents_repeat_the_boundary(tmp_path: Path) -> None:
    write(tmp_path / "a", [[], [[7]], [[], [8, 9]], []])
    assert (tmp_path / "a.idx").read_bytes() == obvious([[], [[7]], [[], [8, 9]], []], 8)[0]
    files = open_tokens(str(tmp_path / "a"))
    assert [files.document(i).tolist() for i in range(4)] == [[], [7], [8, 9], []]
    assert files.lengths.tolist() == [0, 1, 2, 0]


def test_modes_are_told_by_the_size(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32, modes=True) as writer:
        writer.add_document([70000, 2], [1, 1], modes=[0, 1])
        writer.add_document([3], modes=[2])
    assert (tmp_path / "a.idx").read_bytes() == obvious([[[70000], [2]], [[3]]], 4, [0, 1, 2])[0]
    assert contents(open_tokens(str(tmp_path / "a"))) == [[[70000], [2]], [[3]]]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_whole_numbers_of_all_kinds(tmp_path: Path, code: int) -> None:
    info = np.iinfo(DTYPES[code])
    documents = [[[int(info.min), 1, int(info.max)]]]
    write(tmp_path / "a", documents, DTYPES[code])
    assert ((tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()) == obvious(documents, code)
    assert contents(open_tokens(str(tmp_path / "a"))) == documents


def test_fractions_are_no_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.float32) as writer:
        writer.add_document(np.array([0.5]))
    validate(str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"a\.idx: holds float32, which are no token ids"):
        open_tokens(str(tmp_path / "a"))


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_dtype_of_a_vocabulary(vocabulary: int, dtype: type) -> None:
    assert token_dtype(vocabulary) == dtype


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=4), max_size=3), min_size=1, max_size=8),
    code=st.sampled_from([1, 2, 3, 4, 5, 8]),
    cut=st.integers(0, 8),
)
def test_round_trip_against_an_obvious_version(documents: Documents, code: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a"
        with IndexedWriter(prefix, DTYPES[code]) as writer:
            for document in documents[:cut]:
                writer.add_document([x for y in document for x in y], [len(x) for x in document])
            rest = documents[cut:]
            sequences = [x for document in rest for x in document]
            ids = np.array([x for y in sequences for x in y], np.int64)
            writer.add_documents(ids, [len(x) for x in sequences], [len(x) for x in rest])
        assert ((prefix.with_suffix(".idx")).read_bytes(), prefix.with_suffix(".bin").read_bytes()) == obvious(
            documents, code
        )
        if not any(x for y in documents for x in y):
            with pytest.raises(DataError, match="no tokens in 1 file"):
                open_tokens(str(prefix))
            return
        files = open_tokens(str(prefix))
        assert contents(files) == documents
        flat = [[x for y in document for x in y] for document in documents]
        assert [files.document(i).tolist() for i in range(len(files))] == flat
        assert files.lengths.tolist() == [len(x) for x in flat]


def put(at: int, kind: str, value: int) -> bytes:
    return GOLDEN_IDX[:at] + struct.pack("<" + kind, value) + GOLDEN_IDX[at + struct.calcsize(kind) :]


DAMAGE = {
    "not an index": (b"{" * 94, "not an index of token files: begins with b'{{{{{{{{{', not b'MMIDIDX\\x00\\x00'"),
    "legacy": (b"TNTIDX\0\0" + bytes(86), "the older TNTIDX format, which is no longer read"),
    "empty": (b"", f"truncated: 0 bytes, but the header alone has 34; {MEND}"),
    "half a header": (GOLDEN_IDX[:20], f"truncated: 20 bytes, but the header alone has 34; {MEND}"),
    "version": (put(9, "Q", 2), "version 2 of the format; only 1 is known"),
    "dtype": (put(17, "B", 9), "unknown dtype code 9; allowed: 1 (uint8), 2 (int8), 3 (int16)"),
    "no boundaries": (put(26, "Q", 0), "the header says 0 document indices"),
    "hostile sequences": (
        put(18, "Q", 1 << 60),
        f"truncated: {1 << 60} sequences and 2 documents take {34 + 12 * (1 << 60) + 24} bytes",
    ),
    "hostile documents": (put(26, "Q", (1 << 64) - 1), f"truncated: 3 sequences and {(1 << 64) - 2} documents take"),
    "truncated": (
        GOLDEN_IDX[:-1],
        "truncated: 3 sequences and 2 documents take 94 bytes (97 with modes), but the file",
    ),
    "longer": (GOLDEN_IDX + b"\0", "longer than it says: 3 sequences and 2 documents take 94 bytes (97 with modes)"),
    "pointer": (put(54, "q", 7), "sequence 1 points to byte 7, but those before it end at 8"),
    "negative length": (put(38, "i", -2), "sequence 1 has the negative length -2"),
    "first document": (put(70, "q", 1), "the first document starts at sequence 1, not 0"),
    "last document": (put(86, "q", 2), "the last document ends at sequence 2, but there are 3 sequences"),
    "descending": (put(78, "q", 4), "document 1 starts at sequence 4, but the next one at 3"),
    "more tokens": (
        put(34 + 8, "i", 2),
        "a.bin: shorter than its index says: 14 bytes, but 8 tokens of uint16 take 16",
    ),
    "fewer tokens": (
        put(34 + 8, "i", 0),
        "a.bin: longer than its index says: 14 bytes, but 6 tokens of uint16 take 12",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    raw, text = DAMAGE[name]
    (tmp_path / "a.idx").write_bytes(raw)
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    with pytest.raises(DataError) as caught:
        validate(str(tmp_path / "a"))
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/a.")


def test_all_damage_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(put(86, "q", 2)[:54] + struct.pack("<q", 7) + put(86, "q", 2)[62:])
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    with pytest.raises(DataError) as caught:
        validate(str(tmp_path / "a"))
    name = f"{tmp_path}/a.idx"
    assert str(caught.value).split("\n") == [
        f"{name}: sequence 1 points to byte 7, but those before it end at 8; {MEND}",
        f"{name}: the last document ends at sequence 2, but there are 3 sequences; {MEND}",
    ]


@pytest.mark.parametrize(("there", "missing"), [(".bin", ".idx"), (".idx", ".bin")])
def test_one_of_the_pair_is_missing(tmp_path: Path, there: str, missing: str) -> None:
    (tmp_path / f"a{there}").write_bytes({".idx": GOLDEN_IDX, ".bin": GOLDEN_BIN}[there])
    prefix = tmp_path / "a"
    expected = (
        f"{prefix}{missing}: no such file; token files are a pair, {prefix}.bin and {prefix}.idx:"
        " copy it from where the other came from, or preprocess the text again"
    )
    with pytest.raises(DataError) as caught:
        open_tokens(str(prefix))
    assert str(caught.value) == expected


def opens(prefix: Path) -> bool:
    """Whether damaged files open; everything in them is read then. Any error but a DataError passes."""
    try:
        files = open_tokens(str(prefix))
    except DataError:
        return False
    contents(files)
    return True


def test_no_damaged_byte_and_no_truncation_does_worse_than_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    index = tmp_path / "a.idx"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = set()
    for at in range(len(GOLDEN_IDX)):
        for value in {0, 1, 2, 3, 9, 0x7F, 0x80, 0xFF, GOLDEN_IDX[at] ^ 1} - {GOLDEN_IDX[at]}:
            index.write_bytes(GOLDEN_IDX[:at] + bytes([value]) + GOLDEN_IDX[at + 1 :])
            if opens(tmp_path / "a"):
                opened.add(at)
    # another dtype of the same size, and where the second document begins, are data: other documents
    assert opened == {17, 78}
    assert not any(opens_truncated(index, size) for size in range(len(GOLDEN_IDX)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def opens_truncated(index: Path, size: int) -> bool:
    index.write_bytes(GOLDEN_IDX[:size])
    return opens(index.with_suffix(""))
