"""Columns become prompts and answers by name only, in a chat template or in the plain layout."""

import pickle
from typing import Any

import numpy as np
import pytest

from components.config.data import Source
from components.data.chat.formats import Format, HellaSwag, Instruction, Squad, Turn
from components.data.documents import BadRecord
from components.data.encoding import Seat
from components.data.instruction import InstructionEncoder, build_instruction_encoder, columns_of
from components.data.tokenizer import Tokenizer
from components.runtime.errors import ConfigError, DataError
from tests.components.data.chats import backend, template, tokenizer, where

SEAT = Seat(0, 0)
MEND = '; mend the record, or skip such records with data.on_bad_record = "skip"'
SQUAD = {"context": "Ann is here.", "question": "Who?", "answers": {"text": ["Ann", "ann"], "answer_start": [0, 0]}}
SWAG = {"ctx": "Ann sits and", "endings": ["sleeps.", "stands.", "sits.", "is."], "label": "1"}


def refused(form: Format, record: Any) -> str:
    with pytest.raises(BadRecord) as error:
        form.turn(record, where)
    message = str(error.value)
    assert message.startswith("chats.jsonl:7:1: ")
    assert message.endswith(MEND)
    return message.removeprefix("chats.jsonl:7:1: ").removesuffix(MEND)


def test_columns_by_name() -> None:
    form = Instruction("{a.b}: {n}{{x}}\n{ok}", "{the answer}", "You know {n}.")
    record = {"a.b": "A{n}", "n": 3, "ok": True, "the answer": "0.5", "more": None}
    assert form.turn(record, where) == Turn("You know 3.", "A{n}: 3{x}\nTrue", "0.5")
    assert Instruction("say", "{x}").turn({"x": 0.5}, where) == Turn(None, "say", "0.5")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{x!r}", "{x} with a format; only names of columns are allowed"),
        ("{x:>9}", "{x} with a format; only names of columns are allowed"),
        ("{}", "braces without the name of a column; a brace itself is doubled"),
        ("{x", "expected '}' before end of string; columns stand in braces, a brace itself is doubled"),
        ("x}", "Single '}' encountered in format string; columns stand in braces, a brace itself is doubled"),
    ],
)
def test_what_is_no_column(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        Instruction(text, "{y}")
    assert str(error.value) == f"prompt = {text!r}: {what}"


def test_columns_that_do_not_fit() -> None:
    form = Instruction("{q}", "{a}")
    assert refused(form, {"q": "x"}) == "no column 'a' (columns: 'q') (answer names it)"
    assert refused(form, {"q": None, "a": "x"}) == "column 'q' is null, not text or a number (prompt names it)"
    assert refused(form, {"q": "x", "a": ["x"]}) == "column 'a' is list, not text or a number (answer names it)"
    assert (
        refused(form, {"q": "\ud800", "a": "x"}) == "column 'q' holds half of a surrogate pair, which is no character"
    )
    assert refused(form, "text") == "a record must be an object with fields, not text"
    # No attributes and no indices: these are names of columns, which the record has not.
    for column in ("q.__class__", "q[0]"):
        assert refused(Instruction("{" + column + "}", "{a}"), {"q": "x", "a": "y"}) == (
            f"no column {column!r} (columns: 'q', 'a') (prompt names it)"
        )
    with pytest.raises(ConfigError) as error:
        Instruction("{q}", "yes")
    assert str(error.value) == "answer = 'yes': names no column, so that every answer were the same"


def test_squad() -> None:
    prompt = "Context: Ann is here.\nQuestion: Who?"
    assert Squad().turn(SQUAD, where) == Turn(None, prompt, "Ann")
    assert Squad("Read {title}.").turn({**SQUAD, "title": "T"}, where).system == "Read T."
    for answers in ({"text": [], "answer_start": []}, []):
        assert Squad().turn({**SQUAD, "answers": answers}, where).answer == "unanswerable"
    assert Squad().turn({**SQUAD, "answers": [{"text": "Ann", "answer_start": 0}]}, where).answer == "Ann"
    assert refused(Squad(), {**SQUAD, "answers": "Ann"}) == (
        "column 'answers' is str, not an object with a list of text"
    )
    assert refused(Squad(), {**SQUAD, "answers": {"text": [3]}}) == "column 'answers': the first is int, not text"
    assert refused(Squad(), {"context": "x"}) == "no column 'question' (columns: 'context') (kind squad names it)"


def test_hellaswag() -> None:
    for label in ("1", 1):
        assert HellaSwag().turn({**SWAG, "label": label}, where) == Turn(None, "Ann sits and", "stands.")
    assert refused(HellaSwag(), {**SWAG, "label": ""}) == (
        "column 'label' is empty, as in the test split; train on another"
    )
    for label in ("4", -1, "x", None):
        assert refused(HellaSwag(), {**SWAG, "label": label}) == f"column 'label' is {label!r}; allowed are 0 to 3"
    assert refused(HellaSwag(), {**SWAG, "endings": "x"}) == "column 'endings' is not a list of texts"
    assert refused(HellaSwag(), {**SWAG, "endings": []}) == "column 'endings' is empty: there is no ending to learn"


def test_plain_layout() -> None:
    t = tokenizer()
    encoder = InstructionEncoder(t, None, Instruction("{q}", "{a}", "Be brief."))
    encoded = encoder.encode({"q": "Who<|end_of_text|>?", "a": "Ann<|end_of_text|>."}, where, SEAT)
    before, answer = t.encode("Be brief.\n\nWho<|end_of_text|>?\n"), t.encode("Ann<|end_of_text|>.")
    assert encoded.tokens.tolist() == [0, *before, *answer, 1]
    assert encoded.tokens.dtype == np.int64
    assert encoded.targets is not None
    assert encoded.targets.tolist() == [False] * (1 + len(before)) + [True] * (len(answer) + 1)
    bare = InstructionEncoder(t, None, HellaSwag(), add_bos=False).encode(SWAG, where, SEAT)
    before, whole = t.encode("Ann sits and"), t.encode("Ann sits and stands.")
    assert bare.tokens.tolist() == [*whole, 1]
    assert bare.targets is not None
    assert bare.targets.tolist() == [False] * len(before) + [True] * (len(whole) - len(before) + 1)
    assert InstructionEncoder(t, None, HellaSwag(), train_on="all").encode(SWAG, where, SEAT).targets is None


def test_through_a_chat_template() -> None:
    t = tokenizer()
    for form, record, (system, prompt, answer) in (
        (Instruction("{q}", "{a}", "S"), {"q": "Q", "a": "A"}, ("S", "Q", "A")),
        (Squad("S"), SQUAD, ("S", "Context: Ann is here.\nQuestion: Who?", "Ann")),
        (HellaSwag("S"), SWAG, ("S", "Ann sits and", "stands.")),
    ):
        encoded = InstructionEncoder(t, template("qwen2_5"), form).encode(record, where, SEAT)
        text = "".join(
            f"<|im_start|>{x}\n{y}<|im_end|>\n"
            for x, y in (("system", system), ("user", prompt), ("assistant", answer))
        )
        assert encoded.tokens.tolist() == backend().encode(text).ids
        assert encoded.targets is not None
        assert t.decode(encoded.tokens[encoded.targets].tolist()) == f"{answer}<|im_end|>"


def test_nothing_to_learn() -> None:
    with pytest.raises(BadRecord) as error:
        InstructionEncoder(tokenizer(), None, Instruction("{q}", "{q}")).encode({"q": " "}, where, SEAT)
    assert str(error.value) == "chats.jsonl:7:1: the answer is empty, so there is nothing to learn" + MEND
    with pytest.raises(DataError) as fault:
        InstructionEncoder(Tokenizer(backend().to_str()), None, Squad())
    assert str(fault.value) == (
        "the tokenizer has neither a chat template nor an end token, so that a model would not learn to stop;"
        " name an eos_token in tokenizer_config.json, or give the source's chat_template"
    )


def test_built_from_a_source() -> None:
    def fingerprint(**keys: Any) -> dict[str, Any]:
        return build_instruction_encoder(Source(**keys), tokenizer(), None).fingerprint

    def expected(form: Format) -> dict[str, Any]:
        return InstructionEncoder(tokenizer(), None, form).fingerprint

    assert fingerprint(kind="squad", system="S") == expected(Squad("S"))
    assert fingerprint(kind="hellaswag") == expected(HellaSwag())
    keys = {"prompt": "{q}", "answer": "{a}", "system": "S"}
    assert fingerprint(kind="instruction", **keys) == expected(Instruction("{q}", "{a}", "S"))
    assert fingerprint(kind="squad", train_on="all")["train_on"] == "all"
    encoder = build_instruction_encoder(Source(kind="squad"), tokenizer(), None, add_bos=False)
    assert encoder.encode(SQUAD, where, SEAT).tokens[0] != 0
    assert columns_of("{b}{{x}}", "{a} {b}", None) == ["b", "a"]


def test_a_copy_is_the_same() -> None:
    seen = set()
    for form in (Squad(), Squad("S"), HellaSwag(), Instruction("{context}", "{question}")):
        for made in (None, template("gemma")):
            encoder = InstructionEncoder(tokenizer(), made, form)
            copy = pickle.loads(pickle.dumps(encoder))
            assert copy.fingerprint == encoder.fingerprint
            record = {**SQUAD, **SWAG}
            assert (
                copy.encode(record, where, SEAT).tokens.tolist() == encoder.encode(record, where, SEAT).tokens.tolist()
            )
            seen.add(str(encoder.fingerprint))
    assert len(seen) == 8
