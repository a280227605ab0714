"""Chat templates: where they are found, and the text that they make of a chat.

The text is exactly what `transformers.apply_chat_template(tokenize=False)` gives for the same messages; its rules are
the library's: which file counts, which of several named templates is taken, and what a template sees.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.data.chat.messages import Chat, Message, bad
from components.data.encoding import Where
from components.data.paths import find_path
from components.data.tokenizer_files import read_object, read_text, special_tokens
from components.runtime.errors import DataError

if TYPE_CHECKING:
    import jinja2

    from components.data.chat.environment import Sandbox

TOKENS = tuple(f"{x}_token" for x in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that a template may name."""
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Rendering(NamedTuple):
    """A chat as text."""

    text: str
    generated: list[tuple[int, int]] | None
    """Characters (first, after the last) that the template marks as generated; None: it marks none ever."""


class ChatTemplate:
    """A tokenizer's templates and the special tokens that they name.

    Args:
        sources: Template by name: `default`, perhaps `tool_use` for chats with tools.
        tokens: Special tokens by their names in `tokenizer_config.json`.
        origin: What messages call it.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], origin: str) -> None:
        if "default" not in sources:
            there = ", ".join(sources) or "none"
            raise DataError(
                f"{origin}: no chat template is named default (there are: {there}); give the source's chat_template"
            )
        self.sources, self.tokens, self.origin = dict(sources), dict(tokens), origin
        for name in self.sources:
            self._compiled(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.sources, self.tokens, self.origin)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which text a chat becomes."""
        return hashlib.sha256(json.dumps([self.sources, self.tokens], sort_keys=True).encode()).hexdigest()[:16]

    def marks(self, chat: Chat) -> bool:
        """Whether the template for this chat marks what is generated."""
        return bool(MARKS.search(self.sources[self._name(chat)]))

    def render(self, chat: Chat, where: Where, *, prompt: bool = False) -> Rendering:
        """A chat's text, with `prompt` up to where the assistant is to speak next.

        Raises BadRecord where the template refuses the chat or fails on it, DataError where it does what it must not.
        """
        name = self._name(chat)
        text = self._run(name, chat, where, prompt=prompt)
        if not MARKS.search(self.sources[name]):
            return Rendering(text, None)
        plain, spans = _unmark(self._run(name, chat, where, prompt=prompt, marking=True))
        if plain != text:
            raise DataError(f"{self.origin}: marks of generation change what the template prints; mend the template")
        return Rendering(text, spans)

    def _name(self, chat: Chat) -> str:
        return "tool_use" if chat.tools is not None and "tool_use" in self.sources else "default"

    def _run(self, name: str, chat: Chat, where: Where, *, prompt: bool, marking: bool = False) -> str:
        messages = _with_strings(chat.messages) if self._wants_strings[name] else chat.messages
        try:
            return self._print(name, Chat(messages, chat.tools), prompt, marking)
        except _failures() as error:
            raise bad(where, f"the chat template ({self.origin}) {_reason(error)}") from error

    def _print(self, name: str, chat: Chat, prompt: bool, marking: bool) -> str:
        """Text. Raises DataError for what the sandbox forbids, and whatever a template does on a chat."""
        from components.data.chat.environment import SecurityError

        sandbox, template = self._loaded[name]
        values = {**self.tokens, "messages": chat.messages, "tools": chat.tools, "documents": None}
        try:
            return sandbox.render(template, {**values, "add_generation_prompt": prompt}, marking=marking)
        except (SecurityError, RecursionError) as error:
            what = str(error) if isinstance(error, SecurityError) else "it calls itself without end"
            raise DataError(f"{self.origin}: the chat template is not allowed to do this: {what}") from error

    @cached_property
    def _loaded(self) -> dict[str, tuple["Sandbox", "jinja2.Template"]]:
        return {name: self._compiled(name) for name in self.sources}

    @cached_property
    def _wants_strings(self) -> dict[str, bool]:
        """Which templates add arguments of calls to strings, and so must get them as JSON."""
        return {name: self._fails_on_objects(name) for name in self.sources}

    def _fails_on_objects(self, name: str) -> bool:
        try:
            self._print(name, _probe(), prompt=False, marking=False)
        except TypeError:
            return True
        except (*_failures(), DataError):
            return False
        return False

    def _compiled(self, name: str) -> tuple["Sandbox", "jinja2.Template"]:
        import jinja2

        from components.data.chat.environment import Sandbox

        sandbox = Sandbox()
        try:
            return sandbox, sandbox.from_string(self.sources[name])
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self.origin}: line {error.lineno} of the chat template {name!r} is not valid ({error.message});"
                " mend it, or give the source's chat_template"
            ) from error


def load_chat_template(folder: str, file: str | None = None) -> ChatTemplate | None:
    """The template of a tokenizer's folder, or of a file of one's own with the folder's special tokens.

    In the folder, `chat_template.jinja` (and `additional_chat_templates/*.jinja`) counts before `chat_template.json`,
    and that before `tokenizer_config.json`. None: there is none. Raises DataError for files that cannot be read.
    """
    place = find_path(folder)
    if place is None:
        raise DataError(f"{folder}: no such folder; set model.hf_assets_path to a folder that holds tokenizer.json")
    tokens = special_tokens(place, TOKENS)
    if file is not None:
        path = find_path(file)
        if path is None or not path.is_file():
            raise DataError(f"{file}: no such file; set the source's chat_template to a file with a Jinja template")
        return ChatTemplate(_from_file(path), tokens, str(path))
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if (place / name).is_file() and (found := _from_file(place / name)):
            more = {} if name != "chat_template.jinja" else _additional(place)
            return ChatTemplate({**found, **more}, tokens, str(place / name))
    return None


def _from_file(path: Path) -> dict[str, str]:
    """Templates by name: of a `.json` file what is under `chat_template`, else the whole file."""
    if path.suffix != ".json":
        return {"default": read_text(path)}
    found = read_object(path).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(x, dict) and {"name", "template"} <= set(x) for x in found):
        return {str(x["name"]): str(x["template"]) for x in found}
    if found:
        raise DataError(f"{path}: chat_template is neither text nor a list of named templates; mend the file")
    return {}


def _additional(folder: Path) -> dict[str, str]:
    return {x.stem: read_text(x) for x in sorted((folder / "additional_chat_templates").glob("*.jinja"))}


def _unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without marks of generation, and the characters that stood between them."""
    from components.data.chat.environment import BEGIN, GENERATED

    open_at: list[int] = []
    spans: list[tuple[int, int]] = []
    for i, mark in enumerate(GENERATED.finditer(text)):
        place = mark.start() - i
        if mark.group() == BEGIN:
            open_at.append(place)
        elif open_at:
            spans.append((open_at.pop(), place))
    return GENERATED.sub("", text), sorted(x for x in spans if x[0] < x[1])


def _probe() -> Chat:
    """A chat that shows whether a template takes arguments of calls as objects. Mistral's ids have nine characters."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
    return Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}])


def _with_strings(messages: list[Message]) -> list[Message]:
    """Messages whose tool calls have their arguments as JSON in a string."""
    return [
        {**x, "tool_calls": [_with_string(call) for call in x["tool_calls"]]} if "tool_calls" in x else x
        for x in messages
    ]


def _with_string(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _failures() -> tuple[type[Exception], ...]:
    """What a template may raise on a chat that it was not written for."""
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _reason(error: Exception) -> str:
    """What a template's `raise_exception` says, or what went wrong in it."""
    import jinja2

    if type(error) is jinja2.TemplateError:
        return f"refuses this chat: {error}"
    return f"fails on this chat ({type(error).__name__}: {error})"
