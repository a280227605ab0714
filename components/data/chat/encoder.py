"""From chats to tokens, with the loss on what the assistant says."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from components.data.chat.masks import assistant_spans
from components.data.chat.messages import Chat, bad, parse_chat
from components.data.chat.template import ChatTemplate
from components.data.chat.tokens import ChatTokens
from components.data.documents import MEND, BadRecord, Record
from components.data.encoding import Encoded, Seat, Where
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError

TrainOn = Literal["assistant", "last", "all"]


class ChatEncoder:
    """Encoder of chats.

    The template writes begin and end tokens, so none are added here. `data.add_bos` and `data.add_eos` are for text.

    Args:
        tokenizer: Must know the template's control tokens as special tokens.
        messages_field: None: `messages` or `conversations`.
        train_on: Every turn of the assistant, its last one, or every token, headers and results of tools included;
            in each case without turns of weight 0.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        messages_field: str | None = None,
        tools_field: str = "tools",
        train_on: TrainOn = "assistant",
    ) -> None:
        self._tokens, self._template = ChatTokens(tokenizer), template
        self._messages_field, self._tools_field, self._train_on = messages_field, tools_field, train_on
        self.fingerprint: dict[str, Any] = {
            "tokenizer": tokenizer.fingerprint,
            "chat_template": template.fingerprint,
            "messages_field": messages_field,
            "tools_field": tools_field,
            "train_on": train_on,
        }

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """See Encoder. Raises DataError for a template that no chat can be trained with."""
        chat = parse_chat(record, where, messages_field=self._messages_field, tools_field=self._tools_field)
        if self._train_on == "all":
            return self._encode_all(chat, where)
        if not chat.turns:
            answers = any(x["role"] == "assistant" for x in chat.messages)
            what = "all that the assistant says has weight 0" if answers else "the assistant says nothing"
            raise bad(where, f"{what}, so there is nothing to learn")
        return self.encode_chat(chat, chat.turns if self._train_on == "assistant" else chat.turns[-1:], where)

    def encode_chat(self, chat: Chat, turns: Sequence[int], where: Where) -> Encoded:
        """A parsed chat, with the loss on some messages of the assistant. Raises BadRecord."""
        ids, said = self._ids(chat, turns, where)
        if not said[1:].any():
            raise bad(where, "what the assistant says becomes no token, so there is nothing to learn")
        return Encoded(ids, said)

    def _encode_all(self, chat: Chat, where: Where) -> Encoded:
        for i in chat.muted:
            if (role := chat.messages[i]["role"]) != "assistant":
                raise bad(where, f'message {i + 1} ({role}) has weight 0; with train_on = "all" only what the assistant'
                                 " says can be kept out of the loss")  # fmt: skip
        ids, muted = self._ids(chat, chat.muted or None, where)
        if chat.muted and muted[1:].all():
            raise bad(where, "nothing is left to learn: all of it has weight 0")
        return Encoded(ids, ~muted if chat.muted else None)

    def _ids(self, chat: Chat, turns: Sequence[int] | None, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and which of them are of some messages of the assistant; None: of none. # (tokens,), (tokens,) bool"""
        text, spans = self._rendered(chat, turns, where)
        try:
            return self._tokens.encode(text, spans)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            what = f"the tokenizer fails on this chat ({type(error).__name__}: {error})"
            raise BadRecord(f"{where()}:1: {what}; {MEND}") from error

    def render(self, chat: Chat, where: Where) -> str:
        """The text of a chat, as the template prints it. Raises BadRecord."""
        return self._tokens.unescape(self._rendered(chat, None, where)[0])

    def _rendered(self, chat: Chat, turns: Sequence[int] | None, where: Where) -> tuple[str, list[tuple[int, int]]]:
        """Text with private characters for control tokens that messages spell, and what the assistant says in it."""
        messages, tools = self._tokens.escape([chat.messages, chat.tools], where)
        safe = Chat(messages, tools)
        if turns is None:
            text, spans = self._template.render(safe, where).text, []
        else:
            text, spans = assistant_spans(self._template, self._tokens, safe, turns, where)
        if messages is not chat.messages:
            self._check(chat, text, where)
        return text, spans

    def _check(self, chat: Chat, text: str, where: Where) -> None:
        """Raises BadRecord for a template that reads the control tokens which messages spell."""
        if self._tokens.unescape(text) != self._template.render(chat, where).text:
            raise bad(
                where,
                f"a message spells a control token, and the chat template ({self._template.origin}) acts on it;"
                " reasoning belongs into reasoning_content, calls of functions into tool_calls",
            )
