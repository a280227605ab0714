r"""Long texts in pieces whose tokens, one after the other, are those of the whole text.

A tokenizer's objects take a hundred times a text's size: 20 GB for a document of 200 MB. Texts are therefore cut
between a letter and a space before another letter (ASCII all), where that is known to change nothing: the tokenizer
splits texts by one of the patterns below, none of which matches a letter and then a space, or looks back; it normalizes
not at all or by NFC, which joins nothing to a space; and it looks for no words beforehand. Other tokenizers, and texts
without such a place, are encoded whole: exact tokens come before memory.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"\p{Lm}\p{Lo}\p{M}]"
PATTERNS = frozenset(
    {
        # GPT-4 and Llama 3, Qwen 2 and 3, GPT-4o
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{CASED}*[\p{{Ll}}{CASED}+{CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{CASED}+[\p{{Ll}}{CASED}*{CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    }
)
PLACE = re.compile(r"[A-Za-z](?= [A-Za-z])")
LONG = 1 << 20
"""Characters of a piece, at least."""


def pieces(text: str) -> Iterator[str]:
    """The pieces of a text, each of `LONG` characters or more, but for the last."""
    start = 0
    while (found := PLACE.search(text, start + LONG)) is not None:
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def divisible(definition: str) -> bool:
    """Whether the tokenizer of this `tokenizer.json` gives the same tokens for pieces."""
    given = json.loads(definition)
    added = [x for x in given.get("added_tokens") or [] if not x.get("special")]
    normalizer, model = given.get("normalizer"), given["model"]
    plain = not added and normalizer in (None, {"type": "NFC"})
    return plain and model["type"] == "BPE" and not model.get("dropout") and _splits(given.get("pre_tokenizer"))


def _splits(given: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer splits by one of the patterns, or GPT-2's, which is ByteLevel's own."""
    steps = given["pretokenizers"] if given and given["type"] == "Sequence" else [given]
    *before, last = (x or {} for x in steps)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return False
    if not before:
        return last.get("use_regex", True)
    (first, *more), own = before, last.get("use_regex", True)
    known = first.get("type") == "Split" and first.get("pattern", {}).get("Regex") in PATTERNS
    return known and not more and not own and first.get("behavior") == "Isolated" and not first.get("invert")
