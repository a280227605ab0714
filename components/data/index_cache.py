"""Arrays that take seconds to compute, kept as `.npy` between jobs and shared by the processes of a host.

An entry is a folder named by a digest of everything that its arrays depend on, the content of the token files included,
so there is nothing to invalidate: a file that is written anew has another entry. It is written under a temporary name
and renamed whole. Arrays are mapped, so that ranks and loader workers share the pages.

All ranks may build at once, and whoever renames second throws its own away. The price is that each spends the same
seconds that one would; letting one build while the others wait was rejected, since locks are unreliable on network file
systems and a builder that dies would leave the others waiting. An entry's note says what it is of, and has sizes and
checksums of the files and one of its own. All are compared at opening (about 1 GB/s, pages that rows need anyway),
before anything is parsed; what does not fit is built anew. The folder may be deleted at any time.
"""

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from components.runtime.logging import logger

FORMAT = 2
"""To be raised when an array's meaning, the rule that makes it, or what an entry holds changes."""
NOTE = "index.json"
CHUNK = 1 << 24  # bytes

Arrays = dict[str, np.ndarray]
Note = dict[str, Any]


def default_folder() -> Path | None:
    """The user's cache folder (XDG base directories); None if there is no such thing."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~"), ".cache")
    return parent / "espalier" / "indices" if parent.is_absolute() else None


class IndexCache:
    """Arrays by kind and key in a folder; None: the user's cache folder. Without a usable folder they are built."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = default_folder() if folder is None else Path(folder).expanduser()
        self._told = False

    def arrays(self, kind: str, key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]) -> Arrays:
        """The arrays that `build` makes, read-only, from the cache if they are there. Raises what `build` raises.

        Args:
            kind: Begins the entry's name.
            key: All that the arrays depend on, as JSON values.
            build: Makes them by name.
        """
        of = {"format": FORMAT, "kind": kind, "key": key}
        entry = None if self._folder is None else self._folder / f"{kind}-{_digest(of)}"
        if entry is not None and (found := _load(entry, of)) is not None:
            return found
        made = {name: np.ascontiguousarray(x) for name, x in build().items()}
        for array in made.values():
            array.setflags(write=False)
        if entry is None:
            self._tell("this user has no cache folder")
            return made
        return self._kept(entry, made, of)

    def _kept(self, entry: Path, made: Arrays, of: Note) -> Arrays:
        """The arrays, from now on of the entry if that could be written."""
        temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        aside = temporary.with_name(temporary.name + ".damaged")
        try:
            _save(temporary, made, of)
            if entry.exists() and _load(entry, of) is None:
                logger.info(f"{entry}: damaged; built anew")
                os.rename(entry, aside)
            os.rename(temporary, entry)
        except OSError as error:
            if _load(entry, of) is None:  # else another process was first
                self._tell(f"{entry.parent}: cannot be written ({error.strerror or error})")
        for folder in (temporary, aside):
            shutil.rmtree(folder, ignore_errors=True)
        return _load(entry, of) or made

    def _tell(self, why: str) -> None:
        if not self._told:
            logger.info(f"{why}: indices of token files are not kept, and built by each process; set data.cache_folder")
        self._told = True


def _save(folder: Path, arrays: Arrays, of: Note) -> None:
    """Write an entry. Raises OSError."""
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    described = {"of": of, "arrays": {name: _describe(folder / f"{name}.npy") for name in arrays}}
    note = {"digest": _digest(described), **described}
    (folder / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def _load(folder: Path, of: Note) -> Arrays | None:
    """The arrays of an entry, mapped; None if it is not there, damaged, or of something else."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note.pop("digest") != _digest(note) or _digest(note["of"]) != _digest(of):
            return None
        files = {name: folder / f"{name}.npy" for name in note["arrays"]}
        if any(_describe(path) != note["arrays"][name] for name, path in files.items()):
            return None
        return {name: _map(path) for name, path in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _map(path: Path) -> np.ndarray:
    """A plain view of the mapping, which is faster to index than numpy's own class of it."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _describe(path: Path) -> dict[str, int]:
    """What a file must agree with. Raises OSError, and ValueError for an empty one."""
    raw, crc = np.memmap(path, np.uint8, "r").data, 0
    for start in range(0, len(raw), CHUNK):
        crc = zlib.crc32(raw[start : start + CHUNK], crc)
    return {"bytes": len(raw), "crc32": crc}


def _digest(note: Note) -> str:
    """Of JSON values."""
    return sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:32]
