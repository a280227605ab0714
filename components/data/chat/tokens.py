"""From rendered text to ids, where control tokens are the template's alone, and to which ids lie in which spans.

A template's control tokens must become their ids; the same characters in a message are ordinary text, or whoever writes
the message could end it and speak for someone else. So control tokens in messages are replaced by private characters
before rendering (`escape`), and the two kinds are told apart after it. The text is encoded in one call, the template's
control tokens as private added tokens, so that the ids are those that the tokenizer gives for the text. Encoding the
pieces between control tokens one by one was rejected: tokenizers that put a space before a text would put one before
each piece.

A token belongs to a span if it holds any character of it, as in transformers: a token that reaches from a template's
last space into the first word of an answer would else be learnt by nobody.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from components.data.chat.messages import bad, texts
from components.data.encoding import Where, whole_text
from components.data.tokenizer import Tokenizer
from components.runtime.errors import DataError

CONTROL = 0x100000
"""Private characters for a template's control tokens, one for each."""
SPELLED = 0x106000
"""The same for control tokens that a message spells."""
MARK = 0x10C000
"""Private characters from here on stand around fields of messages (masks.py) and generated text (environment.py)."""
CONTROLS = re.compile(f"[{chr(CONTROL)}-{chr(SPELLED - 1)}]")
PRIVATE = re.compile(f"[{chr(CONTROL)}-\U0010ffff]")

Span = tuple[int, int]
"""Characters of a text: the first, and the one after the last."""


class ChatTokens:
    """A tokenizer that knows its control tokens from a message that spells them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        definition = json.loads(tokenizer.definition)
        added = _added(definition, [x for x in (tokenizer.bos_id, tokenizer.eos_id) if x is not None])
        tokens = [x for x in added if x["special"]]
        self._names = [x["content"] for x in tokens]
        if len(tokens) > SPELLED - CONTROL:
            raise DataError(f"the tokenizer has {len(tokens)} special tokens; at most {SPELLED - CONTROL} are allowed")
        self.control = _any_of(self._names)
        """Finds control tokens."""
        self.added = _any_of([x["content"] for x in added])
        """Finds added tokens, control tokens or not."""
        self._index = {name: i for i, name in enumerate(self._names)}
        self._tokens = re.compile(f"{self.control.pattern}|[{chr(SPELLED)}-{chr(MARK - 1)}]")
        self._backend = _backend(definition, tokens)
        self._ids = {_id(self._backend, i): x["id"] for i, x in enumerate(tokens)}
        if len(set(self._backend.get_vocab().values())) < len(self._backend.get_vocab()):
            raise DataError("the tokenizer's ids have gaps, so that chats cannot be encoded; number them from 0 on")

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTokens, (self._tokenizer,)

    def escape(self, value: Any, where: Where) -> Any:
        """A JSON value with private characters for the control tokens that it spells; the same object if none.

        Raises BadRecord for private characters and halves of surrogate pairs in it.
        """
        spelled = False
        for text in texts(value):
            if not text.isascii():
                whole_text(text, "a message", where)
                if found := PRIVATE.search(text):
                    raise bad(where, f"a message holds the private character U+{ord(found.group()):X}, kept for control"
                                     " tokens")  # fmt: skip
            spelled = spelled or bool(self.control.search(text))
        return self._escaped(value) if spelled else value

    def unescape(self, text: str) -> str:
        """Text with the control tokens that messages spell."""
        return self._tokens.sub(lambda x: self._spelled(x.group()), text)

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of an escaped text, and which of them lie in spans. # (tokens,) int64, (tokens,) bool"""
        pieces, shorter, last = [], [(0, 0)], 0
        for found in self._tokens.finditer(text):
            token = found.group()
            new = chr(CONTROL + self._index[token]) if token in self._index else self._spelled(token)
            pieces += [text[last : found.start()], new]
            last = found.end()
            shorter.append((last, shorter[-1][1] + len(token) - len(new)))
        whole = "".join((*pieces, text[last:]))
        encoding = self._backend.encode(whole, add_special_tokens=False)
        ids, offsets = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        for i in np.flatnonzero(np.isin(ids, list(self._ids))):
            ids[i], offsets[i] = self._ids[int(ids[i])], _own(whole, *offsets[i])
        return ids, _inside(offsets, [(_moved(a, shorter), _moved(b, shorter)) for a, b in spans])

    def _spelled(self, token: str) -> str:
        return token if token in self._index else self._names[ord(token) - SPELLED]

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.control.sub(lambda x: chr(SPELLED + self._index[x.group()]), value)
        if isinstance(value, Mapping):
            return {self._escaped(k): self._escaped(x) for k, x in value.items()}
        return [self._escaped(x) for x in value] if isinstance(value, list | tuple) else value


def _moved(place: int, shorter: Sequence[Span]) -> int:
    """A place in a text whose tokens were replaced: `shorter` says by how much the text is shorter after each."""
    return place - shorter[bisect_right(shorter, place, key=lambda x: x[0]) - 1][1]


def _own(text: str, first: int, end: int) -> Span:
    """Characters of a control token, without the spaces that it swallows: they may begin an answer."""
    found = CONTROLS.search(text, first, end)
    return found.span() if found else (first, end)


def _inside(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens hold characters of spans. # (tokens, 2) first character, after the last -> (tokens,) bool"""
    inside = np.zeros(len(offsets), bool)
    for first, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > first)
    return inside


def _added(definition: dict[str, Any], named: Sequence[int]) -> list[dict[str, Any]]:
    """Added tokens of a definition, and there too; those that are named as begin and end count as special."""
    added = definition.setdefault("added_tokens", [])
    known = {x["id"] for x in added}
    if missing := [x for x in named if x not in known]:
        names = Backend.from_str(json.dumps(definition))
        added += [{"id": x, "content": names.id_to_token(x), "normalized": False} for x in missing]
    flags = ("single_word", "lstrip", "rstrip")
    for token in added:
        token |= {x: bool(token.get(x)) for x in flags} | {"special": token.get("special") or token["id"] in named}
    return added


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest that fits, as the tokenizers library does."""
    return re.compile("|".join(re.escape(x) for x in sorted(names, key=len, reverse=True)) or "(?!)")


def _backend(definition: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> Backend:
    """The library's object, in which a private character stands for each control token.

    Without a post-processor, which would cut spaces from the places of tokens.
    """
    backend = Backend.from_str(json.dumps({**definition, "post_processor": None}))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    flags = ("single_word", "lstrip", "rstrip")
    names = [
        AddedToken(chr(CONTROL + i), normalized=False, special=False, **{x: token[x] for x in flags})
        for i, token in enumerate(tokens)
    ]
    backend.add_tokens(names)
    return backend


def _id(backend: Backend, number: int) -> int:
    found = backend.token_to_id(chr(CONTROL + number))
    if found is None:
        raise DataError("the tokenizer takes no more added tokens, so that chats cannot be encoded with it")
    return found
