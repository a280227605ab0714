"""Pairs of answers share their prompt, and the loss is on the answers."""

from typing import Any

import pytest

from components.data.documents import BadRecord
from components.data.encoding import Encoded
from components.data.preference import PreferenceEncoder, parse_pair
from tests.components.data.chats import AGAIN, ASK, MORE, SAY, SYSTEM, backend, template, tokenizer, where

MEND = '; mend the record, or skip such records with data.on_bad_record = "skip"'
NO = {"role": "assistant", "content": "No."}
TEXT = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
S = {"role": "system", "content": "S"}


def learnt(encoded: Encoded) -> str:
    assert encoded.targets is not None
    return tokenizer().decode(encoded.tokens[encoded.targets].tolist())


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [S, ASK], "chosen": [SAY], "rejected": [NO]},
        {"prompt": [S, ASK], "chosen": "Yes, Ann.", "rejected": "No."},
        {"chosen": [S, ASK, SAY], "rejected": [S, ASK, NO]},
        {"prompt": [S, ASK], "chosen": [S, ASK, SAY], "rejected": [S, ASK, NO]},
        {"prompt": None, "chosen": [S, ASK, SAY], "rejected": [S, ASK, NO], "score": 3},
    ],
)
def test_shapes(record: dict[str, Any]) -> None:
    pair = PreferenceEncoder(tokenizer(), template("qwen2_5")).encode_pair(record, where)
    for encoded, answer in zip(pair, ("Yes, Ann.", "No."), strict=True):
        assert encoded.tokens.tolist() == backend().encode(TEXT.format(answer)).ids
        assert learnt(encoded) == f"{answer}<|im_end|>"


def test_texts() -> None:
    record = {"prompt": "Hi?", "chosen": "Yes, Ann.", "rejected": "No."}
    t = tokenizer()
    pair = PreferenceEncoder(t, None).encode_pair(record, where)
    asked = [0, *t.encode("Hi?\n")]
    for encoded, answer in zip(pair, ("Yes, Ann.", "No."), strict=True):
        said = [*t.encode(answer), 1]
        assert encoded.tokens.tolist() == [*asked, *said]
        assert encoded.targets is not None
        assert encoded.targets.tolist() == [False] * len(asked) + [True] * len(said)
    again = PreferenceEncoder(t, template("gemma")).encode_pair(record, where)
    assert [learnt(x) for x in again] == ["Yes, Ann.<end_of_turn>", "No.<end_of_turn>"]


def test_only_what_differs_is_learnt() -> None:
    record = {"chosen": [SYSTEM, ASK, SAY, AGAIN, MORE], "rejected": [SYSTEM, ASK, SAY, AGAIN, NO]}
    pair = PreferenceEncoder(tokenizer(), template("qwen2_5")).encode_pair(record, where)
    assert [learnt(x) for x in pair] == [" Because\n\nit is. <|im_end|>", "No.<|im_end|>"]
    earlier = {"chosen": [ASK, SAY, AGAIN, MORE], "rejected": [ASK, NO, AGAIN, MORE]}
    pair = PreferenceEncoder(tokenizer(), template("qwen2_5")).encode_pair(earlier, where)
    assert [learnt(x) for x in pair] == [
        "Yes, Ann.<|im_end|> Because\n\nit is. <|im_end|>",
        "No.<|im_end|> Because\n\nit is. <|im_end|>",
    ]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "x", "chosen": "y"}, "no field 'rejected' (fields: 'prompt', 'chosen')"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same, so there is nothing to"
                                                          " prefer"),
        ({"prompt": "x", "chosen": "y", "rejected": " "}, "field 'rejected' is empty"),
        ({"chosen": "y", "rejected": "z"}, "chosen and rejected begin with different messages, and there is no prompt"),
        (
            {"chosen": [ASK, SAY, AGAIN], "rejected": [ASK, NO]},
            "field 'chosen' does not end with an answer of the assistant of its own",
        ),
        (
            {"chosen": [ASK, SAY, AGAIN, NO], "rejected": [ASK, SAY]},
            "field 'rejected' does not end with an answer of the assistant of its own",
        ),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "field 'prompt' is int, not a list of messages"),
        ({"chosen": [ASK, {"role": "x"}], "rejected": [ASK]}, "field 'chosen', message 2: role 'x'; allowed are system,"
                                                             " developer, user, assistant, tool, function"),
        ({"prompt": "x\udfff", "chosen": "y", "rejected": "z"}, "field 'prompt' holds half of a surrogate pair, which"
                                                                " is no character"),
    ],
)  # fmt: skip
def test_what_is_refused(record: dict[str, Any], what: str) -> None:
    with pytest.raises(BadRecord) as error:
        parse_pair(record, where)
    assert str(error.value) == f"chats.jsonl:7:1: {what}{MEND}"


def test_chats_need_a_template() -> None:
    with pytest.raises(BadRecord) as error:
        PreferenceEncoder(tokenizer(), None).encode_pair({"chosen": [S, ASK, SAY], "rejected": [S, ASK, NO]}, where)
    assert str(error.value) == (
        "chats.jsonl:7:1: more than a question and its answer, but the tokenizer has no chat template; give"
        " the source's chat_template" + MEND
    )
