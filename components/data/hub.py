"""Hugging Face datasets: by name, streamed over the network, or as `save_to_disk` left them in a folder.

A stream is read from front to back by every rank (only its own documents are tokenized), since sharding the stream by
rank would make the order of the data depend on the layout. `IterableDataset.shuffle` is not used: it loses its buffer
when a job resumes; `data.shuffle_window` does that work.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.data.documents import Read, unreadable
from components.data.watch import LocalFile, fingerprint_of
from components.runtime.errors import DataError

EVERY = 256
"""Documents of a saved dataset between two looks at its files."""


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist locally may be a dataset's name: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w-]*/[\w.-]+", path) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


class HubStream:
    """Sequential over a streamed split."""

    def __init__(self, path: str, split: str, subset: str | None = None) -> None:
        self._path, self._split, self._subset = path, split, subset
        self.fingerprint: dict[str, Any] = {"hub": path, "subset": subset, "split": split}

    def records(self, start: int) -> Iterator[Read]:
        """Records from number `start` on. Raises DataError if the dataset cannot be opened or read."""
        try:
            import datasets

            stream = datasets.load_dataset(self._path, name=self._subset, split=self._split, streaming=True)
            for number, record in enumerate(stream.skip(start), start=start + 1):
                yield HubRecord(dict(record), f"{self._path}[{self._split}]:{number}")
        except (OSError, ValueError, RuntimeError) as error:  # the library's own errors derive from these
            raise self._error(error) from error

    def _error(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return DataError(
            f"{self._path}: no such file or folder, and as a Hugging Face dataset (split {self._split!r})"
            f" it cannot be read ({reason}); check the name and the network, or set dataset_path to a local copy"
        )


class HubRecord(NamedTuple):
    """A record of a stream."""

    fields: dict[str, Any]
    where: str

    def __call__(self) -> dict[str, Any]:
        """Its fields."""
        return self.fields

    def place(self, index: int) -> str:
        """Dataset, split and number, counted from 1."""
        return self.where


class SavedDataset:
    """RandomAccess over a folder that `Dataset.save_to_disk` wrote (memory-mapped); `fields` None: all columns.

    What is mapped and has vanished is still there; what was cut off ends the process that reads it. So the files are
    looked at now and then.
    """

    def __init__(self, folder: Path, fields: Sequence[str] | None = None) -> None:
        import datasets

        self.folder, self._reads = folder, 0
        try:
            rows = datasets.Dataset.load_from_disk(str(folder))
        except OSError as error:
            raise unreadable(folder, error) from error
        if missing := [x for x in fields or () if x not in rows.column_names]:
            told = f"no column {missing[0]!r} (columns: {', '.join(rows.column_names)})"
            raise DataError(f"{folder}: {told}; set data.text_field, or the key of the source, to one")
        if not len(rows):
            raise DataError(f"{folder}: no rows; give a dataset that is not empty")
        self._rows: Any = rows if fields is None else rows.select_columns([*fields])
        self.files = [LocalFile(x) for x in sorted(folder.glob("*.arrow"))]
        self.fingerprint: dict[str, Any] = fingerprint_of(self.files)

    def __len__(self) -> int:
        return len(self._rows)

    def document(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises DataError if a file has changed."""
        if self._reads % EVERY == 0:
            self.check()
        self._reads += 1
        return self._rows[index]

    def place(self, index: int) -> str:
        """Folder and row, counted from 1."""
        return f"{self.folder}:{index + 1}"

    def check(self) -> None:
        """See Watched."""
        for file in self.files:
            file.check()
