"""Tokenizer: `tokenizer.json` plus what its neighbours say about begin and end tokens.

Text never turns into special tokens: a document that spells `<|end_of_text|>` is encoded as ordinary characters, since
only the packer may open and close documents. Post-processors that add such tokens are bypassed for the same reason.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from components.data.paths import find_path
from components.data.tokenizer_files import CONFIG_FILES, read_text, special_tokens
from components.runtime.errors import DataError


class Tokenizer:
    """A `tokenizers` model and the ids of its begin and end tokens (None where it has none)."""

    def __init__(self, definition: str, bos: str | None = None, eos: str | None = None) -> None:
        self._definition, self._bos, self._eos = definition, bos, eos
        self._backend = _backend(definition)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """Largest id + 1: the rows that an embedding needs."""
        self.bos_id, self.eos_id = self._id(bos), self._id(eos)
        self.special_ids = frozenset(self._backend.get_added_tokens_decoder())
        """Tokens that stand for themselves and not for a part of a text: those that open and close documents, say."""

    @property
    def definition(self) -> str:
        """What `tokenizer.json` says."""
        return self._definition

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which ids a text gets."""
        return hashlib.sha256(f"{self._definition}{self.bos_id},{self.eos_id}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end tokens."""
        # The batch call leaves out character offsets, which cost a third of the time. One text starts no threads.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, on several threads. Not for loader workers: threads do not survive a fork."""
        return [x.ids for x in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name; None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def _id(self, token: str | None) -> int | None:
        """Id of a special token. Raises DataError if the vocabulary lacks it."""
        if token is None:
            return None
        found = self._backend.token_to_id(token)
        if found is None:
            raise DataError(f"special token {token!r} is not in the vocabulary; mend {' or '.join(CONFIG_FILES)}")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._definition, self._bos, self._eos)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a folder, looked up from the current folder and then from the project's.

    Raises DataError: no such folder, no `tokenizer.json` in it, a file that cannot be read.
    """
    folder = find_path(path)
    if folder is None or not folder.is_dir():
        raise DataError(f"{path}: no such folder; set model.hf_assets_path to a folder that holds tokenizer.json")
    file = folder / "tokenizer.json"
    if not file.is_file():
        there = ", ".join(sorted(x.name for x in folder.iterdir())) or "nothing"
        raise DataError(
            f"{path}: no tokenizer.json there (there is: {there}); set model.hf_assets_path to a folder that holds one"
        )
    definition, tokens = read_text(file), special_tokens(folder, ("bos_token", "eos_token"))
    try:
        return Tokenizer(definition, tokens.get("bos_token"), tokens.get("eos_token"))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _backend(definition: str) -> Backend:
    """The library's object. Raises DataError if the definition is not one of its own."""
    try:
        backend = Backend.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"not a tokenizer definition ({error}); save it again with the tokenizers library") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # True: spelled-out special tokens are encoded as ordinary text
    return backend
