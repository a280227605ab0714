"""Which characters of a rendered chat the assistant says, its end of turn included: what a loss is taken at.

Templates with `{% generation %}` marks say it themselves. For all others it is found from renderings. Private
characters are put around the fields of every message (within their outer spaces, so that a template that trims still
does), and without them the rendering must be the same as that of the chat as it is. Then, for a turn of the
assistant:

- It begins where the text that asks for it (the messages before it, with `add_generation_prompt`) stops agreeing with
  the whole, counted from the last field before the turn. So headers are not learnt, nor what a prompt opens for the
  model ("<think>"), except where the whole leaves that out.
- It ends after the last control token that follows its last field in the whole as well as in the chat that ends with
  this turn, with and without a prompt for another. So a model learns to stop, but not what stands between turns.

This holds for templates that rewrite earlier turns (dropping their reasoning, say), fold the system's turn into the
user's, or close the last turn differently, since places are compared only next to the turn. What does not fit is
refused; a search for headers by their text was rejected, since it would find them in messages, too.

The price is that each turn takes renderings of all before it, so that time grows with the square of a chat's length,
and long chats are refused. Rendering only the last messages before a turn was rejected: a template may remember any of
the others, and nothing in the text would tell that the mask is wrong.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from components.data.chat.messages import Chat, Message, bad
from components.data.chat.template import ChatTemplate, Rendering
from components.data.chat.tokens import MARK, ChatTokens, Span
from components.data.documents import BadRecord
from components.data.encoding import Where
from components.runtime.errors import DataError

MARKS = re.compile(f"([{chr(MARK)}-\U0010ffef])")
KINDS = ("content", "reasoning", "call")
MAX_BEFORE = 62500
"""Messages before each learnt turn, added up: those of 250 turns in 500 messages."""
Field = tuple[int, int]
"""Message, and index of KINDS."""


class Marked(NamedTuple):
    """A rendering with the places of the fields in it."""

    text: str
    """Without marks."""
    marks: list[tuple[int, Field]]
    """Places where a field begins or ends, in order."""
    messages: list[Message]
    """What was rendered, marks included."""


def assistant_spans(
    template: ChatTemplate, tokens: ChatTokens, chat: Chat, turns: Sequence[int], where: Where
) -> tuple[str, list[Span]]:
    """The text of a chat, and the characters in it that the assistant says in some of its turns.

    Args:
        chat: Escaped, so that the control tokens in its text are the template's.
        turns: Messages of the assistant, counted from 0.

    Raises BadRecord for a chat in which they cannot be told for sure, DataError for a template in which no turn can.
    """
    text, generated = template.render(chat, where)
    if generated is None:
        spans = _found(template, tokens, chat, text, turns, where)
    else:
        spans = _of_turns(template, chat, Rendering(text, generated), turns, where)
    said = "".join(text[a:b] for a, b in spans)
    for i in turns:
        for call in chat.messages[i].get("tool_calls", ()):
            if call["function"]["name"] not in said:
                raise bad(where, f"the chat template ({template.origin}) leaves out the call of a function in message"
                                 f" {i + 1}; take a template that knows tools")  # fmt: skip
    return text, spans


def _found(
    template: ChatTemplate, tokens: ChatTokens, chat: Chat, text: str, turns: Sequence[int], where: Where
) -> list[Span]:
    """What the assistant says in some turns, where the template does not say it."""
    _bound(template, turns, where)
    whole = _marked_whole(template, chat, text, where)
    spans = [_Turn(template, tokens, chat, i, whole, where).span() for i in turns]
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise bad(where, f"the chat template ({template.origin}) mixes up turns of the assistant")
    return spans


def _of_turns(
    template: ChatTemplate, chat: Chat, rendered: Rendering, turns: Sequence[int], where: Where
) -> list[Span]:
    """Marked text of some turns: what holds their fields, or as much as a rendering up to a turn has more."""
    generated = rendered.generated
    if not generated:
        raise bad(where, f"the chat template ({template.origin}) marks nothing in this chat as generated")
    if list(turns) == [i for i, x in enumerate(chat.messages) if x["role"] == "assistant"]:
        return generated
    if speakers := _speakers(template, chat, rendered, where):
        return [x for x, speaker in zip(generated, speakers, strict=True) if speaker in turns]
    _bound(template, turns, where)

    def marks_before(message: int) -> int:
        if not any(x["role"] == "assistant" for x in chat.messages[:message]):
            return 0
        return len(template.render(Chat(chat.messages[:message], chat.tools), where).generated or ())

    return [x for i in turns for x in generated[marks_before(i) : marks_before(i + 1)]]


def _speakers(template: ChatTemplate, chat: Chat, rendered: Rendering, where: Where) -> list[int] | None:
    """The message whose fields each marked text holds; None if they cannot be told by that."""
    try:
        found = template.render(Chat(_with_marks(chat.messages, _fields(chat.messages)), chat.tools), where)
    except BadRecord:
        return None
    spans = found.generated or []
    if MARKS.sub("", found.text) != rendered.text or len(spans) != len(rendered.generated or ()):
        return None
    held = [{_field_of(x.group())[0] for x in MARKS.finditer(found.text, *span)} for span in spans]
    return [x.pop() for x in held] if all(len(x) == 1 for x in held) else None


def _bound(template: ChatTemplate, turns: Sequence[int], where: Where) -> None:
    """Raises BadRecord for a chat that would take long."""
    if sum(turns) > MAX_BEFORE:
        raise bad(
            where,
            f"the messages before each turn that is learnt add up to {sum(turns)}, more than {MAX_BEFORE} (250 turns in"
            f" 500 messages); mark what is generated in the chat template ({template.origin}) with {{% generation %}},"
            ' set train_on to "last" or "all", or split the chat',
        )


class _Turn:
    """Finds one turn of the assistant in a rendering."""

    def __init__(
        self, template: ChatTemplate, tokens: ChatTokens, chat: Chat, turn: int, whole: Marked, where: Where
    ) -> None:
        self._template, self._tokens, self._chat, self._turn = template, tokens, chat, turn
        self._whole, self._where = whole, where

    def span(self) -> Span:
        """Its characters."""
        mine = [i for i, (_, (message, _)) in enumerate(self._whole.marks) if message == self._turn]
        if not mine:
            raise self._unclear("leaves out")
        spoken = self._own(mine)
        first, last = spoken[0], spoken[-1]
        span = self._begin(first), self._end(last)
        if any(x not in range(first, last + 1) and span[0] < p < span[1] for x, (p, _) in self._marks()):
            raise self._unclear("puts other messages into")
        if any(message != self._turn for _, (message, _) in self._whole.marks[first : last + 1]):
            raise self._unclear("puts other messages into")
        return span

    def _marks(self) -> Iterator[tuple[int, tuple[int, Field]]]:
        return ((i, x) for i, x in enumerate(self._whole.marks))

    def _own(self, mine: list[int]) -> list[int]:
        """Marks of the turn itself. The name of a called function may be said again by its result."""
        calls = [i for i in mine if self._whole.marks[i][1][1] == KINDS.index("call")]
        for kind in (0, 1):
            if sum(self._whole.marks[i][1][1] == kind for i in mine) > 2:
                raise self._unclear("says more than once")
        return [i for i in mine if i not in calls[2:]]

    def _begin(self, first: int) -> int:
        """The place up to which the text is what the model is asked with."""
        whole, prompt = self._whole, self._render(self._turn, prompt=True)
        before = whole.marks[first - 1] if first else (0, None)
        asked = prompt.marks[-1] if prompt.marks else (0, None)
        if before[1] != asked[1]:
            raise self._unclear("puts something else before")
        gap, tail = whole.text[before[0] : whole.marks[first][0]], prompt.text[asked[0] :]
        if gap.startswith(tail):
            return before[0] + len(tail)
        least = len(_common(self._after_last(self._render(self._turn, prompt=False)), tail))
        cuts = [0, *(x.start() for x in self._tokens.added.finditer(tail)), *(x.end() for x in re.finditer("\n", tail))]
        agreed = max(x for x in cuts if gap.startswith(tail[:x]))
        if agreed <= least:
            raise self._unclear("opens otherwise than when it asks for an answer")
        return before[0] + agreed

    def _end(self, last: int) -> int:
        """The place after the control token that ends the turn."""
        whole, place = self._whole, self._whole.marks[last][0]
        after = whole.text[place : whole.marks[last + 1][0] if last + 1 < len(whole.marks) else None]
        closed = self._tail(self._render(self._turn + 1, prompt=False))
        ends = list(self._tokens.control.finditer(_common(after, closed)))
        if len(ends) > 1:  # a last turn that closes the whole chat too, where no prompt follows
            ends = list(self._tokens.control.finditer(_common(after, closed, self._asked(closed)))) or ends[:1]
        if ends:
            return place + ends[-1].end()
        end = self._tokens.control.search(after)
        if end is None:
            raise DataError(
                f"{self._template.origin}: the chat template puts no special token after what the assistant says, so"
                " that a model would not learn to stop; mark what it generates with {% generation %}, or give another"
                " with the source's chat_template"
            )
        if any(x.startswith(after[: end.end()]) for x in (closed, self._without_header(self._asked(closed)))):
            return place + end.end()
        raise self._unclear("does not close")

    def _asked(self, closed: str) -> str:
        """What follows the turn's last field where another is asked for; as `closed` where it cannot be."""
        try:
            return self._tail(self._render(self._turn + 1, prompt=True))
        except BadRecord:  # many a template asks only after a user
            return closed

    def _without_header(self, asked: str) -> str:
        """What follows the turn, without the header of the answer that is asked for: none may be taken for an end."""
        header, plain = (self._after_last(self._render(self._turn, prompt=x)) for x in (True, False))
        return asked.removesuffix(header[len(_common(header, plain)) :])

    def _after_last(self, marked: Marked) -> str:
        return marked.text[marked.marks[-1][0] if marked.marks else 0 :]

    def _tail(self, ending: Marked) -> str:
        """What follows the turn's last field in a rendering that ends with it."""
        if not ending.marks or ending.marks[-1][1][0] != self._turn:
            raise self._unclear("leaves out")
        return self._after_last(ending)

    def _render(self, count: int, *, prompt: bool) -> Marked:
        """The first messages, marked."""
        first = Chat(self._whole.messages[:count], self._chat.tools)
        return _read(self._template, first, self._where, prompt=prompt)

    def _unclear(self, what: str) -> BadRecord:
        return bad(
            self._where,
            f"the chat template ({self._template.origin}) {what} message {self._turn + 1}, so that what the assistant"
            " says there cannot be told for sure; mark it in the template with {% generation %}",
        )


def _marked_whole(template: ChatTemplate, chat: Chat, text: str, where: Where) -> Marked:
    """The whole chat with marks around all fields; around as many as leave the text as it is, where some do not."""
    fields = _fields(chat.messages)
    marked = _try(template, chat, fields, text, where)
    if marked is None:
        fields = _harmless(template, chat, fields, text, where)
        marked = _try(template, chat, fields, text, where)
    if marked is None:
        raise bad(where, f"the chat template ({template.origin}) looks into messages, so that what the assistant says"
                         " cannot be told for sure; mark it in the template with {% generation %}")  # fmt: skip
    return marked


def _harmless(template: ChatTemplate, chat: Chat, fields: Sequence[Field], text: str, where: Where) -> list[Field]:
    """The fields that may be marked, found by halves: mostly all but a few."""
    if _try(template, chat, fields, text, where) is not None:
        return list(fields)
    middle = len(fields) // 2
    halves = (fields[:middle], fields[middle:]) if middle else ()
    return [x for half in halves for x in _harmless(template, chat, half, text, where)]


def _try(template: ChatTemplate, chat: Chat, fields: Sequence[Field], text: str, where: Where) -> Marked | None:
    try:
        marked = _read(template, Chat(_with_marks(chat.messages, fields), chat.tools), where)
    except BadRecord:
        return None
    return marked if marked.text == text else None


def _read(template: ChatTemplate, chat: Chat, where: Where, *, prompt: bool = False) -> Marked:
    """Renders marked messages."""
    pieces = MARKS.split(template.render(chat, where, prompt=prompt).text)
    marks, place = [], 0
    for piece, mark in zip(pieces[::2], pieces[1::2], strict=False):
        place += len(piece)
        marks.append((place, _field_of(mark)))
    return Marked("".join(pieces[::2]), marks, chat.messages)


def _fields(messages: Sequence[Message]) -> list[Field]:
    """Fields that hold anything: content, reasoning, and the name of the first function that is called."""
    return [(i, kind) for i, x in enumerate(messages) for kind, name in enumerate(KINDS) if _has(x, name)]


def _has(message: Message, kind: str) -> bool:
    if kind == "call":
        return "tool_calls" in message
    return bool(message.get("content" if kind == "content" else "reasoning_content", "").strip())


def _with_marks(messages: Sequence[Message], fields: Sequence[Field]) -> list[Message]:
    """Messages with private characters around some of their fields."""
    wanted = set(fields)
    return [_around(x, i, wanted) for i, x in enumerate(messages)]


def _around(message: Message, number: int, wanted: set[Field]) -> Message:
    """A message with private characters around the wanted of its fields."""
    marked: dict[str, Any] = dict(message)
    if (number, 0) in wanted:
        marked["content"] = _mark(message["content"], number, 0)
    if (number, 1) in wanted:
        marked["reasoning_content"] = _mark(message["reasoning_content"], number, 1)
        marked["thinking"] = marked["reasoning_content"]
    if (number, 2) in wanted:
        call, *more = message["tool_calls"]
        function = {**call["function"], "name": _mark(call["function"]["name"], number, 2)}
        marked["tool_calls"] = [{**call, "function": function}, *more]
    return marked


def _common(*all_texts: str) -> str:
    """What texts begin with together."""
    return all_texts[0][: sum(1 for _ in takewhile(lambda x: len(set(x)) == 1, zip(*all_texts, strict=False)))]


def _field_of(mark: str) -> Field:
    return divmod((ord(mark) - MARK) // 2, len(KINDS))


def _mark(text: str, number: int, kind: int) -> str:
    core = text.strip()
    before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
    code = MARK + 2 * (number * len(KINDS) + kind)
    return f"{before}{chr(code)}{core}{chr(code + 1)}{after}"
