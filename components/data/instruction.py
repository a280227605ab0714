"""Instructions: a prompt and its answer, through the tokenizer's chat template where there is one.

Without a template the layout is plain: begin token, the system's text and an empty line where there is one, the prompt,
a line's end (HellaSwag: a space), the answer, end token. The loss is on the answer and the end token. So a base model's
tokenizer will do; but whoever serves the model must then write prompts in the same layout.
"""

from itertools import chain
from typing import Any, Protocol

import numpy as np

from components.config.data import Source
from components.data.chat.encoder import ChatEncoder, TrainOn
from components.data.chat.formats import Columns, Format, HellaSwag, Instruction, Squad, Turn
from components.data.chat.messages import Chat, bad
from components.data.chat.template import ChatTemplate
from components.data.chat.tokens import ChatTokens
from components.data.documents import Record
from components.data.encoding import Encoded, Seat, Where
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError


class Layout(Protocol):
    """How a turn is written."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides it, as JSON values."""
        ...

    def encode(self, turn: Turn, between: str, where: Where) -> Encoded:
        """Tokens of a turn, its answer the targets. Raises BadRecord."""
        ...


class TemplateLayout:
    """A turn as a chat."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._chats = ChatEncoder(tokenizer, template)
        self.fingerprint: dict[str, Any] = {"chat_template": template.fingerprint}

    def encode(self, turn: Turn, between: str, where: Where) -> Encoded:
        """See Layout."""
        chat = chat_of(turn)
        return self._chats.encode_chat(chat, chat.turns, where)


class PlainLayout:
    """A turn without a template. Raises DataError for a tokenizer without an end token: nothing would teach to stop."""

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool) -> None:
        if tokenizer.eos_id is None:
            raise DataError(
                "the tokenizer has neither a chat template nor an end token, so that a model would not learn to stop;"
                " name an eos_token in tokenizer_config.json, or give the source's chat_template"
            )
        self._tokens, self._eos = ChatTokens(tokenizer), tokenizer.eos_id
        self._bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self.fingerprint: dict[str, Any] = {"begin_token": self._bos, "end_token": self._eos}

    def encode(self, turn: Turn, between: str, where: Where) -> Encoded:
        """See Layout."""
        before = (f"{turn.system}\n\n" if turn.system else "") + turn.prompt + between
        asked, answer = self._tokens.escape([before, turn.answer], where)
        # A space before an answer is mostly part of its first token, and then learnt with it.
        ids, targets = self._tokens.encode(asked + answer, [(len(asked), len(asked + answer))])
        tokens = np.array([*self._bos, *ids, self._eos], np.int64)
        return Encoded(tokens, np.array([*[False] * len(self._bos), *targets, True]))


class InstructionEncoder:
    """Encoder of prompts and answers.

    Args:
        template: The tokenizer's, or a file's; None: the plain layout.
        form: Which columns are prompt, answer and system.
        train_on: The answer (its only turn), or everything.
        add_bos: Plain layout: put the begin token first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        form: Format,
        *,
        train_on: TrainOn = "assistant",
        add_bos: bool = True,
    ) -> None:
        self._form, self._all = form, train_on == "all"
        self._layout: Layout = (
            PlainLayout(tokenizer, add_bos=add_bos) if template is None else TemplateLayout(tokenizer, template)
        )
        self.fingerprint: dict[str, Any] = {
            "tokenizer": tokenizer.fingerprint,
            "train_on": "all" if self._all else "assistant",
            **self._layout.fingerprint,
            **form.fingerprint,
        }

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """See Encoder."""
        turn = self._form.turn(record, where)
        if not turn.answer.strip():
            raise bad(where, "the answer is empty, so there is nothing to learn")
        encoded = self._layout.encode(turn, self._form.between, where)
        return Encoded(encoded.tokens, None) if self._all else encoded


def build_instruction_encoder(
    source: Source, tokenizer: Tokenizer, template: ChatTemplate | None, *, add_bos: bool = True
) -> InstructionEncoder:
    """The encoder of a source of kind instruction, squad or hellaswag. Raises ConfigError and DataError."""
    form: Format
    match source.kind:
        case "squad":
            form = Squad(source.system)
        case "hellaswag":
            form = HellaSwag(source.system)
        case _:
            form = Instruction(source.prompt or "", source.answer or "", source.system)
    return InstructionEncoder(tokenizer, template, form, train_on=source.train_on, add_bos=add_bos)


def columns_of(prompt: str | None, answer: str | None, system: str | None) -> list[str]:
    """The columns that the texts name, each once. Raises ConfigError."""
    texts = {"prompt": prompt, "answer": answer, "system": system}
    named = (Columns(text, key).names for key, text in texts.items() if text is not None)
    return list(dict.fromkeys(chain.from_iterable(named)))


def chat_of(turn: Turn) -> Chat:
    """A turn as a chat."""
    says = {"system": turn.system, "user": turn.prompt, "assistant": turn.answer}
    return Chat([{"role": role, "content": text} for role, text in says.items() if text is not None])
