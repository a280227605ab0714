"""Records that are no chats but say the same: a question and its answer in columns, made one turn of a chat.

Columns go into texts by name only: "{question}" is the column of that name, whatever characters the name has.
Attributes, indices and formats of Python's own format strings are refused, since a config file must not reach into
objects; and a list or an object in a text would be a mistake more often than a wish.
"""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple, Protocol

from components.data.chat.messages import bad, fields_of
from components.data.documents import Record
from components.data.encoding import Where, whole_text
from components.runtime.errors import ConfigError

UNANSWERABLE = "unanswerable"
"""What is to be learnt where a question of SQuAD 2.0 has no answer in its context."""


class Turn(NamedTuple):
    """A question, its answer, and perhaps what the system says first."""

    system: str | None
    prompt: str
    answer: str


class Format(Protocol):
    """Makes a turn of a record."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides it, as JSON values."""
        ...

    @property
    def between(self) -> str:
        """What stands between prompt and answer where there is no chat template."""
        ...

    def turn(self, record: Record, where: Where) -> Turn:
        """The turn. Raises BadRecord."""
        ...


class Columns:
    """Text with the columns of a record in it: "{question}\\n{context}"; braces are doubled to stand for themselves.

    Raises ConfigError. `key` is what messages call the text.
    """

    def __init__(self, text: str, key: str) -> None:
        self._key, self._parts = key, []
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{key} = {text!r}: {error}; columns stand in braces, a brace itself is doubled"
            ) from error
        for literal, column, form, conversion in parts:
            if column == "":
                raise ConfigError(f"{key} = {text!r}: braces without the name of a column; a brace itself is doubled")
            if form or conversion:
                raise ConfigError(f"{key} = {text!r}: {{{column}}} with a format; only names of columns are allowed")
            self._parts.append((literal, column))

    @property
    def names(self) -> list[str]:
        """The columns, in order."""
        return [x for _, x in self._parts if x is not None]

    def fill(self, record: Mapping[str, Any], where: Where) -> str:
        """The text. Raises BadRecord: no such column, or no text in it."""
        return "".join(x + (self._value(record, y, where) if y is not None else "") for x, y in self._parts)

    def _value(self, record: Mapping[str, Any], column: str, where: Where) -> str:
        value = _column(record, column, where, f" ({self._key} names it)")
        if isinstance(value, bool | int | float):
            return str(value)
        if not isinstance(value, str):
            raise bad(where, f"column {column!r} is {_kind(value)}, not text or a number ({self._key} names it)")
        return whole_text(value, f"column {column!r}", where)


class Instruction:
    """Any columns, put into a prompt, an answer and perhaps a system's turn. Raises ConfigError."""

    between = "\n"

    def __init__(self, prompt: str, answer: str, system: str | None = None) -> None:
        self._prompt, self._answer = Columns(prompt, "prompt"), Columns(answer, "answer")
        self._system = None if system is None else Columns(system, "system")
        if not self._answer.names:
            raise ConfigError(f"answer = {answer!r}: names no column, so that every answer were the same")
        self.fingerprint: dict[str, Any] = {"prompt": prompt, "answer": answer, "system": system}

    def turn(self, record: Record, where: Where) -> Turn:
        """See Format."""
        fields = fields_of(record, where)
        system = None if self._system is None else self._system.fill(fields, where)
        return Turn(system, self._prompt.fill(fields, where), self._answer.fill(fields, where))


class Squad:
    """Question and context of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018); the first answer is to be learnt."""

    between = "\n"

    def __init__(self, system: str | None = None) -> None:
        self._system = None if system is None else Columns(system, "system")
        self._prompt = Columns("Context: {context}\nQuestion: {question}", "kind squad")
        self.fingerprint: dict[str, Any] = {"format": "squad", "system": system}

    def turn(self, record: Record, where: Where) -> Turn:
        """See Format."""
        fields = fields_of(record, where)
        system = None if self._system is None else self._system.fill(fields, where)
        return Turn(system, self._prompt.fill(fields, where), self._answer(fields, where))

    def _answer(self, fields: Mapping[str, Any], where: Where) -> str:
        """The first answer of `{"text": [...]}`, as the dataset has it, or of `[{"text": ...}]`, as its files."""
        answers = _column(fields, "answers", where)
        texts = answers.get("text") if isinstance(answers, Mapping) else answers
        if not isinstance(texts, list | tuple):
            raise bad(where, f"column 'answers' is {_kind(answers)}, not an object with a list of text")
        if not texts:
            return UNANSWERABLE
        first = texts[0].get("text") if isinstance(texts[0], Mapping) else texts[0]
        if not isinstance(first, str):
            raise bad(where, f"column 'answers': the first is {_kind(first)}, not text")
        return whole_text(first, "column 'answers'", where)


class HellaSwag:
    """A text and its true ending out of several (Zellers et al., 2019)."""

    between = " "

    def __init__(self, system: str | None = None) -> None:
        self._system = None if system is None else Columns(system, "system")
        self._prompt = Columns("{ctx}", "kind hellaswag")
        self.fingerprint: dict[str, Any] = {"format": "hellaswag", "system": system}

    def turn(self, record: Record, where: Where) -> Turn:
        """See Format."""
        fields = fields_of(record, where)
        system = None if self._system is None else self._system.fill(fields, where)
        return Turn(system, self._prompt.fill(fields, where), self._ending(fields, where))

    def _ending(self, fields: Mapping[str, Any], where: Where) -> str:
        endings, label = (_column(fields, x, where) for x in ("endings", "label"))
        if not isinstance(endings, list | tuple) or not all(isinstance(x, str) for x in endings):
            raise bad(where, "column 'endings' is not a list of texts")
        if not endings:
            raise bad(where, "column 'endings' is empty: there is no ending to learn")
        if label == "":
            raise bad(where, "column 'label' is empty, as in the test split; train on another")
        number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()) else -1
        if not 0 <= number < len(endings):
            raise bad(where, f"column 'label' is {label!r}; allowed are 0 to {len(endings) - 1}")
        return whole_text(endings[number], "column 'endings'", where)


def _column(record: Mapping[str, Any], name: str, where: Where, why: str = "") -> Any:
    if name not in record:
        raise bad(where, f"no column {name!r} (columns: {_names(list(record))}){why}")
    return record[name]


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(x) for x in names) or "none"


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
