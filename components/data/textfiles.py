"""Plain text files, one document each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.data.documents import decode, files_fingerprint, unreadable


class TextFiles:
    """RandomAccess over whole files. `extra` joins the fingerprint."""

    def __init__(self, files: Sequence[Path], extra: dict[str, Any] | None = None) -> None:
        self._files = tuple(files)
        self.fingerprint: dict[str, Any] = files_fingerprint(self._files) | (extra or {})

    def __len__(self) -> int:
        return len(self._files)

    def document(self, index: int) -> str:
        """Text of file `index`. Raises BadRecord if it is not UTF-8, DataError if it cannot be read."""
        path = self._files[index]
        try:
            return decode(path.read_bytes(), path, 1)
        except OSError as error:
            raise unreadable(path, error) from error

    def place(self, index: int) -> str:
        """The file's first line."""
        return f"{self._files[index]}:1"
