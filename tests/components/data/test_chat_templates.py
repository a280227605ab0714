"""Chats become the text and the ids that transformers makes of them, in a sandbox, from wherever templates are kept."""

import json
import pickle
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from components.data.chat.encoder import ChatEncoder
from components.data.chat.environment import TODAY
from components.data.chat.messages import Chat
from components.data.chat.template import ChatTemplate, load_chat_template
from components.data.documents import BadRecord
from components.data.encoding import Seat
from components.runtime.errors import DataError
from tests.components.data.chats import (
    AGAIN,
    ASK,
    CALL,
    MORE,
    RESULT,
    SAY,
    SYSTEM,
    TEMPLATES,
    THOUGHT,
    TOOLS,
    backend,
    chat,
    template,
    tokenizer,
    where,
)

PLAIN, TALK = [ASK, SAY], [SYSTEM, ASK, SAY, AGAIN, MORE]
THINKING, CALLING = [ASK, THOUGHT, AGAIN, THOUGHT], [SYSTEM, ASK, CALL, RESULT, THOUGHT]
CALLS = ("qwen2_5", "qwen3", "llama3_1", "mistral_tekken", "deepseek", "harmony")
CASES = [
    *((x.stem, messages, None) for x in sorted(TEMPLATES.glob("*.jinja")) for messages in (PLAIN, TALK, THINKING)),
    *((name, CALLING, TOOLS) for name in CALLS),
]


class Noon(datetime):
    """The clock of transformers, stopped at the day on which ours stands."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TODAY


@cache
def encoder(name: str) -> ChatEncoder:
    return ChatEncoder(tokenizer(), template(name))


@cache
def theirs(name: str) -> PreTrainedTokenizerFast:
    source = (TEMPLATES / f"{name}.jinja").read_text()
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=source, **tokens)


@pytest.mark.parametrize(("name", "messages", "tools"), CASES)
def test_text_and_ids_are_those_of_transformers(
    name: str, messages: list[Any], tools: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)
    ours, reference = template(name), theirs(name)
    mine = chat(*messages, tools=tools)
    if name == "deepseek":  # whose template takes arguments as text
        messages = json.loads(json.dumps(messages))
        for call in (call for x in messages for call in x.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    for asking in (False, True):
        text = reference.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asking)
        assert ours.render(mine, where, prompt=asking).text == text
    ids: Any = reference.apply_chat_template(messages, tools=tools)
    encoded = encoder(name).encode_chat(mine, mine.turns, where)
    assert encoded.tokens.tolist() == ids["input_ids"]


@pytest.mark.parametrize("name", ["chatml_marked", "zephyr_marked"])
@pytest.mark.parametrize("messages", [PLAIN, [SYSTEM, ASK, SAY, AGAIN, SAY, AGAIN], [SYSTEM, SAY, SAY, ASK]])
def test_marked_generations_are_those_of_transformers(name: str, messages: list[Any]) -> None:
    reference: Any = theirs(name).apply_chat_template(messages, return_assistant_tokens_mask=True)
    encoded = ChatEncoder(tokenizer(), template(name)).encode({"messages": messages}, where, Seat(0, 0))
    assert encoded.tokens.tolist() == reference["input_ids"]
    assert encoded.targets is not None
    assert encoded.targets.astype(int).tolist() == reference["assistant_masks"]


def one(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, tokens, "t.jinja")


def printed(source: str, conversation: Chat | None = None) -> str:
    return one(source).render(conversation or chat(ASK, SAY), where).text


def test_functions_of_templates() -> None:
    assert printed("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert printed("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert printed("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 1,\n "b": 2\n}'
    assert printed("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert printed("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ 'ab' * 2 }}{{ 2 ** 3 }}") == "2abab8"
    assert printed("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe."),
        (
            "{{ namespace(__class__=1) }}",
            "it sets '__class__' in a namespace; names must not begin with an underscore",
        ),
        ("{% for i in range(10 ** 7) %}x{% endfor %}", "its ranges have more than 1048576 numbers"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "its ranges have more than 1048576 numbers",
        ),
        ("{{ 'x' * 10 ** 9 }}", "it multiplies to more than 16777216 characters"),
        ("{{ 9 ** 9999 }}", "it takes a power of more than 64 bits"),
        ("{{ 'x'.ljust(10 ** 9) }}", "it calls something with 1000000000; at most 16777216 is allowed"),
        (
            "{% set x = 'x' * 100000 %}{% for i in range(999) %}{{ x }}{% endfor %}",
            "it prints more than 16777216 characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
    ],
)
def test_what_the_sandbox_forbids(source: str, what: str) -> None:
    with pytest.raises(DataError) as error:
        printed(source)
    assert str(error.value) == f"t.jinja: the chat template is not allowed to do this: {what}"
    assert not isinstance(error.value, BadRecord)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "refuses this chat: Roles must alternate."),
        ("{{ nothing.at_all }}", "fails on this chat (UndefinedError: 'nothing' is undefined)"),
        ("{{ 'a' + 1 }}", 'fails on this chat (TypeError: can only concatenate str (not "int") to str)'),
        ("{{ 1 / 0 }}", "fails on this chat (ZeroDivisionError: division by zero)"),
    ],
)
def test_what_a_template_refuses(source: str, what: str) -> None:
    with pytest.raises(BadRecord) as error:
        printed(source)
    assert str(error.value) == (
        f"chats.jsonl:7:1: the chat template (t.jinja) {what};"
        ' mend the record, or skip such records with data.on_bad_record = "skip"'
    )


def test_a_template_that_is_not_valid() -> None:
    with pytest.raises(DataError) as error:
        one("a\n{% if %}")
    assert str(error.value) == (
        "t.jinja: line 2 of the chat template 'default' is not valid (Expected an expression, got 'end of statement"
        " block'); mend it, or give the source's chat_template"
    )


def test_marks_that_change_the_text() -> None:
    with pytest.raises(DataError) as error:
        printed("{% filter trim %}{% generation %} x {% endgeneration %}{% endfilter %}")
    assert str(error.value) == "t.jinja: marks of generation change what the template prints; mend the template"


def test_arguments_of_calls_are_as_a_template_takes_them() -> None:
    called = chat(ASK, CALL)
    arguments = "{{ messages[1].tool_calls[0].function.arguments"
    fallback = "{% set ns = namespace() %}{% for m in messages %}{% for c in m.tool_calls or [] %}"
    assert printed(arguments + " | tojson }}", called) == '{"a": 1, "b": "<é>"}'
    source = fallback + "{{ '>' + c.function.arguments }}{% endfor %}{% endfor %}"
    assert printed(source, called) == '>{"a": 1, "b": "<é>"}'


def test_named_templates_survive_a_pickle() -> None:
    both = ChatTemplate({"default": "plain {{ a_token }}", "tool_use": "tools"}, {"a_token": "A"}, "t")
    for made in (both, pickle.loads(pickle.dumps(both))):
        assert made.render(chat(ASK, SAY), where).text == "plain A"
        assert made.render(chat(ASK, SAY, tools=TOOLS), where).text == "tools"
        assert made.fingerprint == both.fingerprint
    assert ChatTemplate(both.sources, {}, "t").fingerprint != both.fingerprint
    with pytest.raises(DataError) as error:
        ChatTemplate({"rag": ""}, {}, "t")
    assert str(error.value) == (
        "t: no chat template is named default (there are: rag); give the source's chat_template"
    )


def test_where_templates_are_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree("tests/assets/tokenizer", tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert load_chat_template(str(folder)) is None

    def text() -> str:
        found = load_chat_template(str(folder))
        assert found is not None
        return found.render(chat(ASK, SAY, tools=TOOLS), where).text

    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "config {{ bos_token }}"}))
    assert text() == "config <|begin_of_text|>"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t {{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert text() == "t <|end_of_text|>"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert text() == "json"
    (folder / "chat_template.jinja").write_text("jinja {{ bos_token }}\n")
    assert text() == "jinja <|begin_of_text|>"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("more")
    assert text() == "more"
    own = tmp_path / "own.jinja"
    own.write_text("own {{ eos_token }}")
    assert load_chat_template(str(folder), str(own)).render(chat(ASK, SAY), where).text == "own <|end_of_text|>"  # pyrefly: ignore [missing-attribute]


def test_files_that_hold_no_template(tmp_path: Path) -> None:
    def failure(*arguments: str) -> str:
        with pytest.raises(DataError) as error:
            load_chat_template(*arguments)
        return str(error.value)

    config = tmp_path / "tokenizer_config.json"
    assert failure("no/such") == (
        "no/such: no such folder; set model.hf_assets_path to a folder that holds tokenizer.json"
    )
    assert failure(str(tmp_path), "no.jinja") == (
        "no.jinja: no such file; set the source's chat_template to a file with a Jinja template"
    )
    config.write_text('{"chat_template": 3}')
    assert failure(str(tmp_path)) == (
        f"{config}: chat_template is neither text nor a list of named templates; mend the file"
    )
    config.write_text("{")
    assert failure(str(tmp_path)).startswith(f"{config}:1:2: not valid JSON (")
    config.write_text("[]")
    assert failure(str(tmp_path)) == f"{config}:1:1: not a JSON object; mend the file"
    config.write_bytes(b"\xff")
    assert failure(str(tmp_path)) == f"{config}: not UTF-8 at byte 0; mend or replace the file"
