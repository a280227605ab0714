"""Chats of both shapes become the messages that templates take; what does not fit is refused by message and reason."""

import json
from typing import Any

import numpy as np
import pyarrow
import pytest

from components.data.chat.messages import Chat, parse_chat
from components.data.documents import BadRecord, Record

MEND = 'mend the record, or skip such records with data.on_bad_record = "skip"'
USER = {"role": "user", "content": "Hi"}
SAYS = {"role": "assistant", "content": "Hello"}


def parse(record: Record, **fields: Any) -> Chat:
    return parse_chat(record, lambda: "chats.jsonl:7", **fields)


def refused(record: Record, **fields: Any) -> str:
    with pytest.raises(BadRecord) as error:
        parse(record, **fields)
    message = str(error.value)
    assert message.startswith("chats.jsonl:7:1: ")
    assert message.endswith("; " + MEND)
    return message.removeprefix("chats.jsonl:7:1: ").removesuffix("; " + MEND)


def test_openai_shape() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    record = {
        "messages": [
            {"role": "system", "content": "Be brief.", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, "x", {"text": "?"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "2", "reasoning": "easy", "tool_calls": []},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    parsed = {**call, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    chat = parse(record)
    assert chat == Chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + x?", "name": "ann"},
            {"role": "assistant", "tool_calls": [parsed]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {
                "role": "assistant",
                "content": "2",
                "reasoning": "easy",
                "thinking": "easy",
                "reasoning_content": "easy",
            },
        ],
        [{"type": "function", "function": {"name": "add"}}],
    )
    assert chat.turns == [2, 4]
    assert parse({"messages": json.dumps(record["messages"]), "tools": json.dumps(record["tools"])}) == chat


def test_sharegpt_shape() -> None:
    turns = [
        ("system", "S"),
        ("human", "Q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "R"),
        ("function_response", "R2"),
        ("tool", "R3"),
        ("gpt", "A"),
        ("user", "Q2"),
        ("assistant", "A2"),
    ]
    record = {"conversations": [{"from": x, "value": y} for x, y in turns], "tools": ""}
    chat = parse(record)
    assert chat.tools is None
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "assistant", "user", "assistant"]
    assert [x["role"] for x in chat.messages] == roles
    assert [x.get("content") for x in chat.messages] == ["S", "Q", None, "R", "R2", "R3", "A", "Q2", "A2"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert chat.messages[2] == {"role": "assistant", "tool_calls": [call]}


def test_values_as_parquet_gives_them() -> None:
    messages = [{**USER, "tool_calls": None}, {**SAYS, "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    row = pyarrow.Table.from_pylist([{"messages": messages, "tools": ['{"name": "f"}']}]).to_pylist()[0]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert parse(row) == Chat([USER, {**SAYS, "tool_calls": [call]}], [{"name": "f"}])


def test_fields_by_name_and_what_is_not_to_be_learnt() -> None:
    record = {"chat": [USER, {**SAYS, "weight": 0}, USER, {**SAYS, "weight": 1}], "functions": [{"name": "f"}]}
    chat = parse(record, messages_field="chat", tools_field="functions")
    assert (chat.turns, chat.tools) == ([3], [{"name": "f"}])


def say(*messages: object) -> dict[str, Any]:
    return {"messages": [USER, *messages]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "a record must be an object with fields, not text"),
        (np.zeros(2, np.int64), "a record must be an object with fields, not token ids"),
        (
            {"text": "x"},
            "no field 'messages' or 'conversations' (fields: 'text'; the source's messages_field names the field to"
            " read)",
        ),
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": 3}, "field 'messages' is int, not a list of messages"),
        ({"messages": "[{"}, "field 'messages' is a string, but not JSON (Expecting property name enclosed in double"
                             " quotes)"),
        ({"messages": [USER] * 2001}, "field 'messages' has 2001 messages; at most 2000 are allowed"),
        (say({**SAYS, "weight": 0.5}), "field 'messages', message 2: weight 0.5; allowed are 0 (not to be learnt)"
                                       " and 1"),
        (say("Hello"), "field 'messages', message 2 is str, not an object"),
        (say({"content": "x"}), "field 'messages', message 2 has neither 'role' nor 'from' (fields: 'content')"),
        (
            say({"role": "bot", "content": "x"}),
            "field 'messages', message 2: role 'bot'; allowed are system, developer, user, assistant, tool, function",
        ),
        (
            say({"from": "bot", "value": "x"}),
            "field 'messages', message 2: from 'bot'; allowed are system, human, user, gpt, assistant, function_call,"
            " tool, observation, function_response",
        ),
        (say({"from": "gpt"}), "field 'messages', message 2 (gpt) has no value"),
        (say({"role": "user"}), "field 'messages', message 2 (user) has no content"),
        (say({"role": "user", "content": 3}), "field 'messages', message 2: content is int, not text"),
        (
            say({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
            "field 'messages', message 2, part 1 of its content is of type 'image_url'; only text can be trained on",
        ),
        (say({"role": "user", "content": ["", 3]}), "field 'messages', message 2, part 2 of its content is int, not"
                                                    " text"),
        (
            say({"role": "assistant", "content": " "}),
            "field 'messages', message 2 (assistant) says nothing: it has neither content nor tool_calls",
        ),
        (say({**SAYS, "thinking": 3}), "field 'messages', message 2: the reasoning is int, not text"),
        (say({**SAYS, "tool_calls": {}}), "field 'messages', message 2: tool_calls is dict, not a list"),
        (say({**SAYS, "tool_calls": [3]}), "field 'messages', message 2, tool call 1 is int, not an object"),
        (say({**SAYS, "tool_calls": [{"id": 3}]}), "field 'messages', message 2, tool call 1 names no function"),
        (
            say({**SAYS, "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
            "field 'messages', message 2, tool call 1: its arguments are list, not an object",
        ),
        (
            say({**SAYS, "tool_calls": [{"name": "f", "arguments": "f(1)"}]}),
            "field 'messages', message 2, tool call 1: its arguments is a string, but not JSON (Expecting value)",
        ),
        (
            say({"from": "function_call", "value": "f()"}),
            "field 'messages', message 2 is a string, but not JSON (Expecting value)",
        ),
        ({**say(SAYS), "tools": 3}, "the tools are int, not a list of definitions"),
        ({**say(SAYS), "tools": ["{}", "3"]}, "tool 2 is int, not an object"),
    ],
)  # fmt: skip
def test_what_is_refused(record: Record, reason: str) -> None:
    assert refused(record) == reason


def test_a_named_field_that_is_not_there() -> None:
    assert refused({"messages": [USER, SAYS]}, messages_field="chat") == (
        "no field 'chat' (fields: 'messages'; the source's messages_field names the field to read)"
    )
