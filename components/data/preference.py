"""Preference pairs: one prompt and two answers, of which one was preferred; both encoded, the loss on the answers.

There is no loss of pairs yet, so jobs refuse to train on them; `scripts/inspect_data.py` shows them. Three shapes are
read, as they are published: texts under `prompt`, `chosen` and `rejected`; messages under all three; whole chats under
`chosen` and `rejected`, with or without the prompt beside them. The prompt is then what the two begin with together.
"""

from itertools import takewhile
from typing import Any, NamedTuple

from components.data.chat.encoder import ChatEncoder
from components.data.chat.formats import Turn
from components.data.chat.messages import Chat, Message, bad, fields_of, parse_messages
from components.data.chat.template import ChatTemplate
from components.data.documents import Record
from components.data.encoding import Encoded, Where, whole_text
from components.data.instruction import PlainLayout
from components.data.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Two answers to one prompt, the prompt in front of each; targets are the tokens of the answers."""

    chosen: Encoded
    rejected: Encoded


class PreferenceEncoder:
    """Makes pairs of records. Without a template, texts only, in the plain layout (`instruction.py`)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, *, add_bos: bool = True) -> None:
        self._chats = None if template is None else ChatEncoder(tokenizer, template)
        self._plain = PlainLayout(tokenizer, add_bos=add_bos) if template is None else None
        layout = self._plain.fingerprint if self._plain else {}
        made_by = {"chat_template": template.fingerprint} if template else layout
        self.fingerprint: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, **made_by}

    def encode_pair(self, record: Record, where: Where) -> Pair:
        """Both answers. Raises BadRecord."""
        chosen, rejected, prompt = parse_pair(record, where)
        return Pair(self._encode(chosen, prompt, where), self._encode(rejected, prompt, where))

    def _encode(self, messages: list[Message], prompt: int, where: Where) -> Encoded:
        chat = Chat(messages)
        if self._chats is not None:
            return self._chats.encode_chat(chat, [x for x in chat.turns if x >= prompt], where)
        plain = [(x["role"], "content" in x) for x in messages] == [("user", True), ("assistant", True)]
        if self._plain is None or not plain:
            raise bad(where, "more than a question and its answer, but the tokenizer has no chat template; give the"
                             " source's chat_template")  # fmt: skip
        return self._plain.encode(Turn(None, *(x["content"] for x in messages)), "\n", where)


def parse_pair(record: Record, where: Where) -> tuple[list[Message], list[Message], int]:
    """The two chats of a record, and with how many messages both begin. Raises BadRecord."""
    fields = fields_of(record, where)
    for name in ("chosen", "rejected"):
        if fields.get(name) is None:
            there = ", ".join(repr(x) for x in fields) or "none"
            raise bad(where, f"no field {name!r} (fields: {there})")
    asked = [] if fields.get("prompt") is None else _messages(fields["prompt"], "prompt", "user", where)
    chosen, rejected = (_answered(asked, fields[x], x, where) for x in ("chosen", "rejected"))
    if chosen == rejected:
        raise bad(where, "chosen and rejected are the same, so there is nothing to prefer")
    prompt = sum(1 for _ in takewhile(lambda x: x[0] == x[1], zip(chosen, rejected, strict=False)))
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant" or prompt == len(messages):
            raise bad(where, f"field {name!r} does not end with an answer of the assistant of its own")
    if not prompt:
        raise bad(where, "chosen and rejected begin with different messages, and there is no prompt")
    return chosen, rejected, prompt


def _answered(asked: list[Message], value: object, name: str, where: Where) -> list[Message]:
    """A whole chat: the answer may repeat the prompt."""
    said = _messages(value, name, "assistant", where)
    return said if said[: len(asked)] == asked else [*asked, *said]


def _messages(value: object, name: str, role: str, where: Where) -> list[Message]:
    """Messages of a list, or a text as the only one."""
    if isinstance(value, str):
        if role == "assistant" and not value.strip():
            raise bad(where, f"field {name!r} is empty")
        return [{"role": role, "content": whole_text(value, f"field {name!r}", where)}]
    return parse_messages(value, where, f"field {name!r}")
