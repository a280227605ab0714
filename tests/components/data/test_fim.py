"""Fill in the middle: what a document becomes, how often, and what it depends on."""

import pickle
from collections import Counter
from functools import cache
from itertools import islice
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from components.data.documents import BadRecord
from components.data.encoding import Seat, TextEncoder
from components.data.files import open_files
from components.data.fim import KNOWN, FimEncoder, Marks, cut, find_marks
from components.data.rows import Cursor
from components.data.tokenizer import Tokenizer
from components.runtime.errors import ConfigError
from tests.components.data.corpus import streamed, texts, write_lines
from tests.components.data.corpus import tokenizer as plain_tokenizer

STARCODER = KNOWN["StarCoder"]
PRE, SUF, MID = 2048, 2049, 2050
BEGIN, END = 0, 1
LAST = (1 << 64) - 1


@cache
def tokenizer(*names: str, special: bool = True) -> Tokenizer:
    """The shipped one with further tokens."""
    backend = Backend.from_file("tests/assets/tokenizer/tokenizer.json")
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return Tokenizer(backend.to_str(), "<|begin_of_text|>", "<|end_of_text|>")


def encoder(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 7, source: str = "code", **more: bool) -> FimEncoder:
    return FimEncoder(
        tokenizer(*STARCODER, special=more.get("special", True)),
        "text",
        marks=Marks(PRE, SUF, MID),
        rate=rate,
        spm_rate=spm_rate,
        seed=seed,
        source=source,
        add_bos=more.get("add_bos", True),
        add_eos=more.get("add_eos", True),
    )


def place() -> str:
    return "a.jsonl:3"


def ids(fim: FimEncoder, text: str, position: int = 0, epoch: int = 0) -> list[int]:
    return fim.encode(text, place, Seat(epoch, position)).tokens.tolist()


def parts(tokens: list[int]) -> tuple[str, list[int], list[int]]:
    """Kind, suffix and what stands around it, in reading order: with SPM prefix and middle are one."""
    body = tokens[1:-1]
    if body[0] != PRE:
        return "plain", [], body
    suffix, middle = body.index(SUF), body.index(MID)
    return "SPM" if suffix == 1 else "PSM", body[suffix + 1 : middle], body[1:suffix] + body[middle + 1 :]


def test_what_a_fixed_seed_gives() -> None:
    text, fim = "def f(x):\n    return x + 1\n\nprint(f(2))\n", encoder(0.75, seed=1)
    assert [tokenizer(*STARCODER).decode(ids(fim, text, position)[1:-1]) for position in range(6)] == [
        "<fim_prefix>def f(x):\n    return <fim_suffix><fim_middle>x + 1\n\nprint(f(2))\n",
        "<fim_prefix>def f(x):\n    return<fim_suffix>\n<fim_middle> x + 1\n\nprint(f(2))",
        "<fim_prefix>def f(x):\n <fim_suffix>f(2))\n<fim_middle>   return x + 1\n\nprint(",
        "<fim_prefix><fim_suffix>\n<fim_middle>def f(x):\n    return x + 1\n\nprint(f(2))",
        "def f(x):\n    return x + 1\n\nprint(f(2))\n",
        "def f(x):\n    return x + 1\n\nprint(f(2))\n",
    ]
    assert ids(encoder(), "return x", 1) == [0, 2048, 2049, 843, 2050, 266, 325, 1]
    assert ids(encoder(), "return x", 2) == [0, 2048, 266, 85, 2049, 843, 2050, 297, 79, 1]
    assert fim.encode(text, place, Seat(0, 0)).targets is None


@pytest.mark.parametrize("text", ["x", "def f(x):\n    return x\n", "naïve — ė e\u0301 👩‍👩‍👧 日本語\n", *texts(3)[:1]])
def test_without_the_marks_it_is_the_text(text: str) -> None:
    fim, kinds = encoder(), set()
    for position in range(50):
        kind, suffix, rest = parts(ids(fim, text, position))
        kinds.add(kind)
        assert tokenizer().decode(rest) + tokenizer().decode(suffix) == text
    assert kinds <= {"PSM", "SPM"}


def test_each_part_is_encoded_by_itself() -> None:
    text, fim = "def f(self):\n    return self.x\n", encoder(spm_rate=0.0)
    for position in range(50):
        body = ids(fim, text, position)[1:-1]
        suffix, middle = body.index(SUF), body.index(MID)
        for part in (body[1:suffix], body[suffix + 1 : middle], body[middle + 1 :]):
            assert part == tokenizer().encode(tokenizer().decode(part))


def test_cuts_are_between_any_two_characters_and_may_coincide() -> None:
    assert cut("abc", 0, 0) == ("", "", "abc")
    assert cut("abc", LAST, LAST) == ("abc", "", "")
    assert cut("abc", LAST, 0) == ("", "abc", "")
    assert cut("abc", 1 << 62, 1 << 63) == ("a", "b", "c")
    assert cut("", LAST, 5) == ("", "", "")


def test_cuts_are_uniform() -> None:
    drawn = np.random.Generator(np.random.Philox(3)).integers(0, LAST, 16000, np.uint64)
    counts = Counter(len(cut("abc", int(bits), int(bits))[0]) for bits in drawn)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 4000) < 4 * sqrt(16000 * 0.25 * 0.75) for count in counts.values())


def test_rates() -> None:
    fim, text, count = encoder(0.4, 0.25), "some words of text " * 16, 2000
    kinds = Counter(parts(ids(fim, text, position, position % 3))[0] for position in range(count))
    for kind, share in (("plain", 0.6), ("PSM", 0.3), ("SPM", 0.1)):
        assert abs(kinds[kind] - count * share) < 4 * sqrt(count * share * (1 - share)), kinds
    never, always, psm, spm = encoder(0.0), encoder(1.0), encoder(spm_rate=0.0), encoder(spm_rate=1.0)
    for position in range(200):
        assert parts(ids(never, text, position))[0] == "plain" != parts(ids(always, text, position))[0]
        assert parts(ids(spm, text, position))[0] == "SPM"
        same = ids(psm, text, position) == ids(spm, text, position)  # without a prefix the two are one
        assert parts(ids(psm, text, position))[0] == ("SPM" if same else "PSM")


def test_other_documents_are_as_a_text_encoder_s() -> None:
    fim, plain = encoder(0.5), TextEncoder(tokenizer(*STARCODER), "text", add_bos=True, add_eos=True)
    for position, text in enumerate(texts(60)):
        tokens = ids(fim, text, position)
        if PRE not in tokens:
            assert tokens == plain.encode(text, place, Seat(0, position)).tokens.tolist()


def test_an_empty_text_stays_empty() -> None:
    assert {tuple(ids(encoder(), "", position)) for position in range(20)} == {(BEGIN, END)}
    assert ids(encoder(add_bos=False, add_eos=False), "") == []


def test_a_record_may_have_fields() -> None:
    fim = encoder()
    assert fim.encode({"text": "a b c"}, place, Seat(1, 2)).tokens.tolist() == ids(fim, "a b c", 2, 1)
    with pytest.raises(BadRecord, match=r"^a\.jsonl:3:1: no field 'text' \(fields: 'code'; data\.text_field names"):
        fim.encode({"code": "a"}, place, Seat(0, 0))
    with pytest.raises(BadRecord, match=r"^a\.jsonl:3:1: the document holds half of a surrogate pair"):
        ids(fim, "a\ud83d")


def test_a_document_depends_on_its_seat_alone() -> None:
    documents = texts(40)
    seats = [Seat(epoch, position) for epoch in range(2) for position in range(40)]
    fim = encoder(0.8)
    whole = [ids(fim, documents[s.position], s.position, s.epoch) for s in seats]
    for start in range(len(seats)):  # a resume or a worker has a copy, which begins anywhere
        copy = pickle.loads(pickle.dumps(fim))
        epoch, position = seats[start]
        assert ids(copy, documents[position], position, epoch) == whole[start]
    backwards = [ids(fim, documents[s.position], s.position, s.epoch) for s in reversed(seats)]
    assert backwards[::-1] == whole
    assert whole[:40] != whole[40:]  # another epoch cuts elsewhere


def test_a_restart_after_any_row_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    documents = open_files(str(write_lines(tmp_path / "a.jsonl", texts(7))), None)
    source = streamed(documents, streams=2, encoder=encoder(0.7))

    def rows(cursor: Cursor, count: int) -> list[tuple[bytes, Cursor]]:
        (stream,) = streamed(documents, streams=2, encoder=encoder(0.7)).open({1: cursor})
        return [(row.tokens.tobytes(), after) for row, after in islice(stream, count)]

    whole = rows(source.start()[1], 40)
    assert {after[1] for _, after in whole} >= {0, 1, 2}  # through epochs
    for number in range(39):
        assert rows(whole[number][1], 39 - number) == whole[number + 1 :]


def test_draws_differ_by_seed_and_source() -> None:
    text = "some words of text"
    drawn = [
        tuple(tuple(ids(encoder(seed=seed, source=name), text, p)) for p in range(8))
        for seed, name in ((7, "code"), (8, "code"), (7, "web"))
    ]
    assert len({*drawn}) == 3


def test_the_fingerprint_knows_the_draws() -> None:
    plain = TextEncoder(tokenizer(*STARCODER), "text", add_bos=True, add_eos=True).fingerprint
    fim = {"tokens": [PRE, SUF, MID], "rate": 1.0, "spm_rate": 0.5, "seed": 7, "source": "code"}
    assert encoder().fingerprint == plain | {"fim": fim}


def test_a_document_that_spells_a_mark() -> None:
    text = "a <fim_suffix> b"
    spelled = ids(encoder(), text)
    assert sorted(x for x in spelled if x >= PRE) == [PRE, SUF, MID]  # special tokens are never text's
    lax = encoder(special=False)
    assert {tuple(x for x in ids(lax, text, position) if x >= PRE) for position in range(20)} != {(SUF,)}
    for position in range(20):
        kind, suffix, rest = parts(ids(lax, text, position))
        assert SUF not in suffix + rest or kind == "plain"


@pytest.mark.parametrize("family", KNOWN)
def test_marks_that_are_known(family: str) -> None:
    assert find_marks(tokenizer(*KNOWN[family]), [], "code") == (PRE, SUF, MID)


def test_marks_that_are_named() -> None:
    other = tokenizer("[M]", "[S]", "[P]")
    assert find_marks(other, ["[P]", "[S]", "[M]"], "code") == Marks(2050, 2049, 2048)


def refusal(names: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        find_marks(plain_tokenizer(), names, "code")
    return str(caught.value)


def test_marks_that_are_refused() -> None:
    three = "must be three different tokens, those before prefix, suffix and middle"
    assert refusal(["a", "b"]) == f"source 'code': fim_tokens = ['a', 'b']: {three}"
    assert refusal(["a", "b", "a"]) == f"source 'code': fim_tokens = ['a', 'b', 'a']: {three}"
    assert refusal(["a", "<S>", "<M>"]) == (
        "source 'code': fim_tokens = ['a', '<S>', '<M>']: not in the tokenizer's vocabulary: <S>, <M>; name others, or"
        " add them to its tokenizer.json"
    )
    assert refusal([]) == (
        "source 'code': fim_rate needs tokens that stand before prefix, suffix and middle, and the tokenizer has none"
        " that are known: <fim_prefix> <fim_suffix> <fim_middle> (StarCoder); <|fim_prefix|> <|fim_suffix|>"
        " <|fim_middle|> (Qwen2.5-Coder, CodeGemma); ▁<PRE> ▁<SUF> ▁<MID> (CodeLlama); <｜fim▁begin｜> <｜fim▁hole｜>"
        " <｜fim▁end｜> (DeepSeek-Coder); [PREFIX] [SUFFIX] [MIDDLE] (Codestral); name three tokens of its vocabulary"
        " in fim_tokens, or take another model.hf_assets_path"
    )
