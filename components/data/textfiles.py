"""Plain text files, one document each."""

from collections.abc import Sequence
from typing import Any

from components.data.documents import decode
from components.data.watch import DataFile, fingerprint_of


class TextFiles:
    """RandomAccess over whole files. `extra` joins the fingerprint."""

    def __init__(self, files: Sequence[DataFile], extra: dict[str, Any] | None = None) -> None:
        self.files = tuple(files)
        self.fingerprint: dict[str, Any] = fingerprint_of(self.files) | (extra or {})

    def __len__(self) -> int:
        return len(self.files)

    def document(self, index: int) -> str:
        """Text of file `index`. Raises BadRecord if it is not UTF-8, DataError if it cannot be read or has changed."""
        file = self.files[index]
        with file.open() as opened, file.guarded():
            raw = opened.read()
        return decode(raw, file, 1)

    def place(self, index: int) -> str:
        """The file's first line."""
        return f"{self.files[index]}:1"

    def check(self) -> None:
        """See Watched."""
        for file in self.files:
            file.check()
