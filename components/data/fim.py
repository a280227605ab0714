"""Fill in the middle: some documents are rearranged, so that a model learns to write what stands between two texts.

A document is cut at two uniform places into prefix, middle and suffix (Bavarian et al., "Efficient Training of Language
Models to Fill in the Middle", 2022). It is cut between characters, before it is encoded, since whoever asks for a
middle also asks between characters, not between tokens; the three parts are then encoded each by itself, so the text's
own tokens are not kept at the cuts, and a tokenizer that puts a space before a text puts one before each part.
Rearranging packed rows, as Megatron-LM does, was rejected: what becomes of a document would depend on its neighbours.

What is drawn for a document is a pure function of the job's seed, its source's name and its seat, so no rank, worker or
resume changes it, and in another epoch it is cut elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from components.data.documents import Record
from components.data.encoding import Encoded, Seat, TextEncoder, Where, encode_text, text_in
from components.data.order import FIM, named_seed, raw_bits
from components.data.tokenizer import Tokenizer
from components.runtime.errors import ConfigError

KNOWN = {
    "StarCoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "Qwen2.5-Coder, CodeGemma": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "CodeLlama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    # Named by where they stand in a prompt, begin prefix hole suffix end: so `end` is what the middle follows.
    "DeepSeek-Coder": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    "Codestral": ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
}
"""Families → their tokens before prefix, suffix and middle."""


class Marks(NamedTuple):
    """Ids of the tokens that stand before the parts."""

    prefix: int
    suffix: int
    middle: int


class FimEncoder(TextEncoder):
    """Encoder of text that rearranges a share of the documents; all others are as of a TextEncoder.

    Args:
        field: Field of a record that holds the text.
        source: Name of the source, by which its draws are keyed.
        rate: Share of the documents that are rearranged. Never are those that are empty, or that spell a mark which
            this tokenizer does not hold for special: nobody could tell it from ours.
        spm_rate: Share of these that have the suffix first (SPM), `PRE SUF suffix MID prefix middle`, rather than
            `PRE prefix SUF suffix MID middle` (PSM).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        field: str,
        *,
        marks: Marks,
        rate: float,
        spm_rate: float,
        seed: int,
        source: str,
        add_bos: bool,
        add_eos: bool,
    ) -> None:
        super().__init__(tokenizer, field, add_bos=add_bos, add_eos=add_eos)
        self._marks, self._rate, self._spm_rate = marks, rate, spm_rate
        self._seed = named_seed(seed, source)
        fim = {"tokens": list(marks), "rate": rate, "spm_rate": spm_rate, "seed": seed, "source": source}
        self.fingerprint = self.fingerprint | {"fim": fim}

    def encode(self, record: Record, where: Where, seat: Seat) -> Encoded:
        """See Encoder. The loss is taken at every token, as in the paper."""
        bits = [int(x) for x in raw_bits(self._seed, seat.epoch, seat.position, FIM, 4)]
        text = text_in(record, self._field, where)
        if not text or not _happens(bits[0], self._rate):
            return super().encode(text, where, seat)
        parts = [encode_text(self._tokenizer, part, where) for part in cut(text, bits[2], bits[3])]
        if any(not {*self._marks}.isdisjoint(ids) for ids in parts):
            return super().encode(text, where, seat)
        ids = self._arranged(*parts, suffix_first=_happens(bits[1], self._spm_rate))
        return Encoded(np.array([*self._bos, *ids, *self._eos], np.int64), None)

    def _arranged(self, prefix: list[int], middle: list[int], suffix: list[int], *, suffix_first: bool) -> list[int]:
        marks = self._marks
        if suffix_first:
            return [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
        return [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]


def cut(text: str, first: int, second: int) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text. `first`, `second`: 64 random bits each; every place between two characters
    and both ends are as likely, and the two may coincide."""
    start, end = sorted((bits * (len(text) + 1)) >> 64 for bits in (first, second))
    return text[:start], text[start:end], text[end:]


def find_marks(tokenizer: Tokenizer, names: Sequence[str], source: str) -> Marks:
    """The marks that `fim_tokens` names, or where it is empty those that the tokenizer has under a known name.

    Raises ConfigError for other than three different tokens of the vocabulary, and if none are known.
    """
    if names:
        return _named(tokenizer, names, source)
    for known in KNOWN.values():
        ids = [tokenizer.token_id(name) for name in known]
        if None not in ids:
            return Marks(*(x for x in ids if x is not None))
    known = "; ".join(f"{' '.join(tokens)} ({family})" for family, tokens in KNOWN.items())
    raise ConfigError(
        f"source {source!r}: fim_rate needs tokens that stand before prefix, suffix and middle, and the tokenizer has"
        f" none that are known: {known}; name three tokens of its vocabulary in fim_tokens, or take another"
        " model.hf_assets_path"
    )


def _named(tokenizer: Tokenizer, names: Sequence[str], source: str) -> Marks:
    shown = f"source {source!r}: fim_tokens = {list(names)}"
    if len(names) != 3 or len({*names}) != 3:
        raise ConfigError(f"{shown}: must be three different tokens, those before prefix, suffix and middle")
    ids = {name: tokenizer.token_id(name) for name in names}
    if missing := [name for name, found in ids.items() if found is None]:
        raise ConfigError(
            f"{shown}: not in the tokenizer's vocabulary: {', '.join(missing)}; name others, or add them to its"
            " tokenizer.json"
        )
    return Marks(*(x for x in ids.values() if x is not None))


def _happens(bits: int, rate: float) -> bool:
    """Whether an event of this probability happens."""
    return bits < int(rate * (1 << 64))
