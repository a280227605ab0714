"""Chats as records hold them, in one shape: messages with a role, text, and perhaps reasoning and calls of tools.

Two shapes are read, per message: OpenAI's (`role`, `content`, `tool_calls`, ...) and ShareGPT's (`from`, `value`). What
comes out is what Hugging Face templates take, so keys that are not known here (a name, an id) stay where they are. A
record that does not fit is refused as a whole, with the message and the reason: leaving out the message that is wrong
would train on a conversation that nobody had.

Arguments of tool calls come out as objects even where they were JSON in a string, as OpenAI writes them: templates say
`arguments | tojson`, which would quote a string once more; the few that add them to a string get a string again.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from components.data.documents import MEND, BadRecord, Record
from components.data.encoding import Where

Message = dict[str, Any]

ROLES = {x: x for x in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
"""OpenAI's roles → those of templates."""
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` → roles of templates."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what the assistant thinks before it speaks; templates read the first, or (gpt-oss) the second."""
FIELDS = ("messages", "conversations")
MAX_MESSAGES = 2000


class Chat(NamedTuple):
    """A conversation, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def turns(self) -> list[int]:
        """Which messages the assistant says, counted from 0, without those that it is not to learn (`weight` 0)."""
        return [i for i, x in enumerate(self.messages) if x["role"] == "assistant" and x.get("weight") != 0]

    @property
    def muted(self) -> list[int]:
        """Which messages are not to be learnt."""
        return [i for i, x in enumerate(self.messages) if x.get("weight") == 0]


def bad(where: Where, what: str) -> BadRecord:
    """The error for a record."""
    return BadRecord(f"{where()}:1: {what}; {MEND}")


def parse_chat(record: Record, where: Where, *, messages_field: str | None = None, tools_field: str = "tools") -> Chat:
    """The chat of a record. Raises BadRecord."""
    fields = fields_of(record, where)
    name = messages_field or next((x for x in FIELDS if fields.get(x) is not None), None)
    if name is None or fields.get(name) is None:
        asked = repr(messages_field) if messages_field else " or ".join(repr(x) for x in FIELDS)
        there = ", ".join(repr(x) for x in fields) or "none"
        raise bad(where, f"no field {asked} (fields: {there}; the source's messages_field names the field to read)")
    return Chat(parse_messages(fields[name], where, f"field {name!r}"), _tools(fields.get(tools_field), where))


def fields_of(record: Record, where: Where) -> Mapping[str, Any]:
    """The fields of a record. Raises BadRecord if it has none."""
    if not isinstance(record, Mapping):
        found = "text" if isinstance(record, str) else "token ids"
        raise bad(where, f"a record must be an object with fields, not {found}")
    return record


def parse_messages(value: object, where: Where, what: str) -> list[Message]:
    """Messages from a list of them, or from JSON in a string. `what` names the field. Raises BadRecord."""
    found = _json(value, where, what) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise bad(where, f"{what} is {_kind(found)}, not a list of messages")
    if not found:
        raise bad(where, f"{what} is empty")
    if len(found) > MAX_MESSAGES:
        raise bad(where, f"{what} has {len(found)} messages; at most {MAX_MESSAGES} are allowed")
    return [_message(x, where, f"{what}, message {i}") for i, x in enumerate(found, start=1)]


def texts(value: object) -> Iterator[str]:
    """Every string in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts(key)
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def _message(value: object, where: Where, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise bad(where, f"{what} is {_kind(value)}, not an object")
    message = {str(k): v for k, v in value.items() if v is not None}
    message = message if "role" in message else _from_sharegpt(message, where, what)
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise bad(where, f"{what}: role {role!r}; allowed are {', '.join(ROLES)}")
    message["role"] = ROLES[role]
    if "content" in message:
        message["content"] = _content(message["content"], where, what)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where, what)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if role == "assistant":
        return _assistant(message, where, what)
    if "content" not in message:
        raise bad(where, f"{what} ({role}) has no content")
    return message


def _assistant(message: Message, where: Where, what: str) -> Message:
    """What the assistant says, its reasoning under both names that templates read. Raises BadRecord."""
    reasoning = next((message[x] for x in REASONING if x in message), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise bad(where, f"{what}: the reasoning is {_kind(reasoning)}, not text")
    if not str(message.get("content", "")).strip() and "tool_calls" not in message:
        raise bad(where, f"{what} (assistant) says nothing: it has neither content nor tool_calls")
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise bad(where, f"{what}: weight {weight!r}; allowed are 0 (not to be learnt) and 1")
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _from_sharegpt(message: Message, where: Where, what: str) -> Message:
    if "from" not in message:
        there = ", ".join(repr(x) for x in message) or "none"
        raise bad(where, f"{what} has neither 'role' nor 'from' (fields: {there})")
    speaker, rest = message["from"], {k: v for k, v in message.items() if k not in ("from", "value")}
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise bad(where, f"{what}: from {speaker!r}; allowed are {', '.join(SPEAKERS)}")
    if "value" not in message:
        raise bad(where, f"{what} ({speaker}) has no value")
    value = message["value"]
    if speaker != "function_call":
        return {"role": SPEAKERS[speaker], "content": value, **rest}
    calls = _json(value, where, what) if isinstance(value, str) else value
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _content(value: object, where: Where, what: str) -> str:
    """Text, or the text of all parts. Raises BadRecord."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise bad(where, f"{what}: content is {_kind(value)}, not text")
    return "".join(_part(x, where, f"{what}, part {i} of its content") for i, x in enumerate(value, start=1))


def _part(value: object, where: Where, what: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise bad(where, f"{what} is {_kind(value)}, not text")
    if value.get("type", "text") != "text" or not isinstance(value.get("text"), str):
        raise bad(where, f"{what} is of type {value.get('type')!r}; only text can be trained on")
    return str(value["text"])


def _calls(value: object, where: Where, what: str) -> list[dict[str, Any]]:
    """Tool calls, arguments as objects; a bare `{name, arguments}` gets the usual shell. Raises BadRecord."""
    found = _json(value, where, f"{what}, tool_calls") if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise bad(where, f"{what}: tool_calls is {_kind(found)}, not a list")
    return [_call(x, where, f"{what}, tool call {i}") for i, x in enumerate(found, start=1)]


def _call(value: object, where: Where, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise bad(where, f"{what} is {_kind(value)}, not an object")
    call = {str(k): v for k, v in value.items() if v is not None}
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad(where, f"{what} names no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, where, f"{what}: its arguments") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise bad(where, f"{what}: its arguments are {_kind(arguments)}, not an object")
    return {**call, "function": {**function, "arguments": dict(arguments or {})}}


def _tools(value: object, where: Where) -> list[Any] | None:
    """Tool definitions, None if there are none. Raises BadRecord."""
    found = (_json(value, where, "the tools") if value.strip() else None) if isinstance(value, str) else value
    if found is None:
        return None
    if not isinstance(found, list | tuple):
        raise bad(where, f"the tools are {_kind(found)}, not a list of definitions")
    tools = [_json(x, where, f"tool {i}") if isinstance(x, str) else x for i, x in enumerate(found, start=1)]
    for i, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise bad(where, f"tool {i} is {_kind(tool)}, not an object")
    return tools or None


def _json(text: str, where: Where, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise bad(where, f"{what} is a string, but not JSON ({reason})") from error


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
