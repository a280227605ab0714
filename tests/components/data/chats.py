"""A tokenizer that knows the control tokens of many families, their templates, and chats, for the tests of chats."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from components.data.chat.messages import Chat, parse_chat
from components.data.chat.template import ChatTemplate
from components.data.encoding import Where
from components.data.tokenizer import Tokenizer

TEMPLATES = Path("tests/assets/chat_templates")
CONTROL = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "llama3_1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral_tekken": (
        *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "harmony": ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
    "command_r": (
        *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
}
ORDINARY = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<｜User｜>", "<｜Assistant｜>"),
    *(f"<｜tool▁{x}▁{y}｜>" for x in ("calls", "call", "outputs", "output") for y in ("begin", "end")),
)
"""Added tokens that are not special, as in those families."""
PHI = ("<|system|>", "<|user|>", "<|assistant|>")
"""Phi-3's, which swallow the spaces after them."""

SYSTEM, ASK = {"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi?"}
SAY = {"role": "assistant", "content": "Yes, Ann."}
AGAIN, MORE = {"role": "user", "content": " Why so?\n"}, {"role": "assistant", "content": " Because\n\nit is. "}
THOUGHT = {"role": "assistant", "content": "It is so.", "reasoning_content": "Let me think.\nHm."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
    ],
}
RESULT = {"role": "tool", "content": "\n3 ", "tool_call_id": "abcdefghi"}
ADD = {"name": "add", "description": 'Adds "two"', "parameters": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": ADD}]

where: Where = partial(str, "chats.jsonl:7")


@cache
def backend() -> Backend:
    made = Backend.from_file("tests/assets/tokenizer/tokenizer.json")
    made.add_special_tokens([x for names in CONTROL.values() for x in names])
    made.add_special_tokens([AddedToken(x, rstrip=True, special=True) for x in PHI])
    made.add_tokens([AddedToken(x, special=False, normalized=False) for x in ORDINARY])
    return made


@cache
def tokenizer(eos: str = "<|end_of_text|>") -> Tokenizer:
    return Tokenizer(backend().to_str(), "<|begin_of_text|>", eos)


def template(name: str) -> ChatTemplate:
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    path = TEMPLATES / f"{name}.jinja"
    return ChatTemplate({"default": path.read_text()}, tokens, str(path))


def chat(*messages: dict[str, Any], tools: list[Any] | None = None) -> Chat:
    """The messages, parsed."""
    return parse_chat(json.loads(json.dumps({"messages": messages, "tools": tools})), where)
