"""Long texts in pieces give the tokens of the whole, and are cut only for tokenizers where that is known."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from components.data.preprocess import encode, long_texts
from components.data.preprocess.job import open_tokenizer, preprocess
from components.data.preprocess.long_texts import PATTERNS, divisible, pieces
from components.data.tokenizer import Tokenizer
from tests.components.data.preprocessing import TOKENIZER, corpus, expected, options, write, written

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(split: Any, normalizer: Any = None, **model: Any) -> Backend:
    """A small tokenizer that splits in this way."""
    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer = split  # pyrefly: ignore[bad-assignment]
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore[bad-assignment]
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [str(x["text"]) for x in corpus(60)] + ["a b c it's the An e\u0301 a b"] * 9
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def isolated(pattern: str, *more: Any) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), *more, last])


OWN = pre_tokenizers.ByteLevel(add_prefix_space=False)
BACKENDS = {
    "GPT-2": trained(OWN),
    "GPT-4": trained(isolated(GPT4), normalizers.NFC()),
    "GPT-4o": trained(isolated(GPT4O)),
}


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="aAb cé\u0301\u0327\u0130'sdz12 .-\n\r\t\u00a0\u2028汉ǅ", max_size=60),
    size=st.integers(min_value=0, max_value=8),
)
def test_tokens_of_pieces_are_those_of_the_whole(name: str, text: str, size: int) -> None:
    tokenizer = Tokenizer(BACKENDS[name].to_str())
    assert divisible(tokenizer.definition)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "LONG", size)
        cut = list(pieces(text))
    assert "".join(cut) == text
    assert [x for piece in cut for x in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_pieces_are_about_as_long_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG", 10)
    cut = list(pieces("some words of a text, and 4 5 6 7 8 9 10 11 12 13 at the end."))
    assert cut == ["some words of", " a text, and 4 5 6 7 8 9 10 11 12 13 at", " the end."]
    assert list(pieces("x" * 30)) == ["x" * 30]


def test_only_tokenizers_that_are_known_are_given_pieces() -> None:
    assert divisible((TOKENIZER / "tokenizer.json").read_text())
    assert {GPT4, GPT4.replace("{1,3}", ""), GPT4O} == PATTERNS
    others = [
        trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        trained(isolated(r"\w+\s?")),
        trained(isolated(GPT4, pre_tokenizers.Digits())),
        trained(pre_tokenizers.Metaspace()),
        trained(OWN, normalizers.Strip()),
        trained(OWN, dropout=0.1),
    ]
    assert [divisible(x.to_str()) for x in others] == [False] * len(others)
    added = trained(OWN)
    added.add_tokens(["a b"])
    assert not divisible(added.to_str())
    none = json.loads(trained(OWN).to_str()) | {"pre_tokenizer": None}
    assert not divisible(json.dumps(none))


def test_files_of_long_texts_are_those_of_the_obvious_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG", 20)
    monkeypatch.setattr(encode, "LONG", 20)
    words = "import this and that from there"
    more = [{"text": ["", words * 4, "a b", words], "title": words}, {"text": ["short", ""], "title": ""}]
    records = [*corpus(40), *more, *corpus(20)]
    file = write(tmp_path / "a.jsonl", records)
    calls: list[str] = []
    real = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: calls.append(text) or real(self, text))
    preprocess(options(tmp_path / "out", file, keys=("text", "title"), prepend_bos=True), 0)
    assert written(tmp_path / "out_text_document") == expected(records, bos=0)
    assert written(tmp_path / "out_title_document") == expected(records, "title", bos=0)
    assert len(calls) > 20
    assert open_tokenizer(str(TOKENIZER)).encode(words) == real(open_tokenizer(str(TOKENIZER)), words)
