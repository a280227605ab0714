"""Hugging Face datasets: by name, streamed over the network, or as `save_to_disk` left them in a folder.

A stream is read from front to back by every rank (only its own documents are tokenized), since sharding the stream by
rank would make the order of the data depend on the layout. `IterableDataset.shuffle` is not used: it loses its buffer
when a job resumes; `data.shuffle_window` does that work.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from components.data.documents import Read, files_fingerprint, text_of
from components.runtime.errors import DataError


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist locally may be a dataset's name: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w-]*/[\w.-]+", path) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


class HubStream:
    """Sequential over a streamed split."""

    def __init__(self, path: str, field: str, split: str, subset: str | None = None) -> None:
        self._path, self._field, self._split, self._subset = path, field, split, subset
        self.fingerprint: dict[str, Any] = {"hub": path, "subset": subset, "split": split, "text_field": field}

    def records(self, start: int) -> Iterator[Read]:
        """Records from number `start` on. Raises DataError if the dataset cannot be opened or read."""
        try:
            import datasets

            stream = datasets.load_dataset(self._path, name=self._subset, split=self._split, streaming=True)
            for number, record in enumerate(stream.skip(start), start=start + 1):
                yield partial(text_of, dict(record), self._field, f"{self._path}[{self._split}]", number)
        except (OSError, ValueError, RuntimeError) as error:  # the library's own errors derive from these
            raise self._error(error) from error

    def _error(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return DataError(
            f"{self._path}: no such file or folder, and as a Hugging Face dataset (split {self._split!r})"
            f" it cannot be read ({reason}); check the name and the network, or set dataset_path to a local copy"
        )


class SavedDataset:
    """RandomAccess over a folder that `Dataset.save_to_disk` wrote (memory-mapped)."""

    def __init__(self, folder: Path, field: str) -> None:
        import datasets

        self._folder, self._field = folder, field
        self._rows = datasets.Dataset.load_from_disk(str(folder))
        names = self._rows.column_names
        if field not in names:
            raise DataError(
                f"{folder}: no column {field!r} (columns: {', '.join(names)}); set data.text_field to one of them"
            )
        if not len(self._rows):
            raise DataError(f"{folder}: no rows; give a dataset that is not empty")
        files = sorted(folder.glob("*.arrow"))
        self.fingerprint: dict[str, Any] = files_fingerprint(files) | {"text_field": field}

    def __len__(self) -> int:
        return len(self._rows)

    def document(self, index: int) -> str:
        """Text in row `index`. Raises BadRecord."""
        return text_of(self._rows[index], self._field, self._folder, index + 1)

    def place(self, index: int) -> str:
        """Folder and row."""
        return f"{self._folder}:{index + 1}"
