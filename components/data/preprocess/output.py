"""The growing output: appended to in order, and cut back to its journal when a run goes on after a kill.

    PREFIX.partial/KEY.bin, KEY.idx, KEY.ends    tokens; lengths, where the index will have them; ends of documents
    PREFIX.partial/journal.json                  what of the input is in them, and how long they were then

The journal is replaced as a whole after all that it tells of is on the disk, so whatever came later is cut off and
made again. At the end the indices are completed, the journal says so, and the files get their names, the index last; a
kill in between repeats the rest. IndexedWriter's temporary files were rejected: a kill is not to cost a day's work.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from components.data.preprocess.encode import LISTED, EncodedChunk, Part
from components.data.preprocess.inputs import Chunk, Position
from components.data.token_index import CHUNK, CODES, HEADER, LENGTH, MAGIC, POINTER, VERSION
from components.runtime.durable import sync_folder
from components.runtime.errors import DataError

JOURNAL = "journal.json"
BUFFER = 1 << 20


@dataclass
class Progress:
    """How far a job is."""

    position: Position = field(default_factory=Position)
    """In the input: everything before it is written."""
    documents: int = 0
    characters: int = 0
    """Of the texts."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Of each key."""
    empty: dict[str, int] = field(default_factory=dict)
    """Documents of each key without a text."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Bad records by kind."""
    bad: list[str] = field(default_factory=list)
    """The first of them: where, and what is wrong."""
    seconds: float = 0.0
    """Of work, all runs of the job together."""

    def lines_before(self, chunk: Chunk) -> int:
        """Lines of its file before the next chunk."""
        return self.position.line if chunk.first == self.position.file else 0


class Output:
    """Files of each key, appended to in order.

    Args:
        prefix: Of all paths; its folder is made.
        names: Path without extension of each key's files.
        dtype: Of the tokens.
        fingerprint: What the output is made of, by name; a stopped run with another one is refused.
        overwrite: Replace finished files, and what a stopped run of something else has left.

    Raises DataError: finished files, a stopped run of something else, another process that writes, a folder that cannot
    be written to.
    """

    def __init__(
        self, prefix: str, names: Mapping[str, str], dtype: str, fingerprint: Mapping[str, str], overwrite: bool
    ) -> None:
        self._prefix, self._names, self._fingerprint = prefix, dict(names), dict(fingerprint)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._folder = Path(f"{prefix}.partial")
        self.finishing = False
        """All is written, and the files are about to get their names."""
        self.progress = Progress(tokens=dict.fromkeys(names, 0), empty=dict.fromkeys(names, 0))
        self._refuse_finished(overwrite)
        self._spools: dict[str, _Spool] = {}
        with ExitStack() as opened:
            self._lock(opened)
            sizes = self._resumed(overwrite)
            for key in () if self.finishing else names:
                with _writable(prefix):
                    self._spools[key] = _Spool(self._folder / key, sizes.get(key), opened)
            self._opened = opened.pop_all()

    @property
    def resumed(self) -> bool:
        """Something of an earlier run is there."""
        return self.finishing or self.progress.position != Position()

    def write(self, done: EncodedChunk) -> None:
        """Append the documents of the next chunk. Raises DataError."""
        progress = self.progress
        before = progress.lines_before(done.chunk)
        for (key, spool), part in zip(self._spools.items(), done.parts, strict=True):
            with _writable(self._prefix):
                spool.write(part)
            progress.tokens[key] += len(part.tokens)
            progress.empty[key] += int((part.sequences == 0).sum())
        progress.documents += done.documents
        progress.characters += done.characters
        for kind, count in done.dropped.items():
            progress.dropped[kind] = progress.dropped.get(kind, 0) + count
        progress.bad += [f"{x.where(before)}: {x.what}" for x in done.bad[: LISTED - len(progress.bad)]]
        progress.position = done.chunk.after(before + done.lines)

    def save(self) -> None:
        """Make durable what was written, and then say so. Raises DataError."""
        with _writable(self._prefix):
            for spool in self._spools.values():
                spool.sync()
            journal = {
                "fingerprint": self._fingerprint,
                "finishing": self.finishing,
                "progress": asdict(self.progress),
                "sizes": {key: spool.sizes for key, spool in self._spools.items()},
            }
            write_json(self._folder / JOURNAL, journal)

    def finish(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the indices and give all files their names; the report that is there then. Raises DataError."""
        path = Path(f"{self._prefix}.report.json")
        with _writable(self._prefix):
            if not self.finishing:
                for spool in self._spools.values():
                    spool.complete(self._dtype)
                write_json(self._folder / "report.json", report)
                self.finishing = True
                self.save()
            for key, name in self._names.items():
                _publish(self._folder / key, name)
            _rename(self._folder / "report.json", str(path))
            self._remove()
            return json.loads(path.read_bytes())

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()

    def _remove(self) -> None:
        """The folder; its journal last, so that a kill before leaves a run that is finishing."""
        for path in self._folder.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        (self._folder / JOURNAL).unlink()
        self._folder.rmdir()

    def _lock(self, opened: ExitStack) -> None:
        with _writable(self._prefix):
            self._folder.mkdir(parents=True, exist_ok=True)
            locked = os.open(self._folder, os.O_RDONLY)
        opened.callback(os.close, locked)
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self._prefix}: another process is writing there; wait for it, or stop it") from error

    def _refuse_finished(self, overwrite: bool) -> None:
        if overwrite or (self._journal() or {}).get("finishing"):
            return
        there = [f"{x}{suffix}" for x in self._names.values() for suffix in (".bin", ".idx") if _is(f"{x}{suffix}")]
        if there:
            raise DataError(f"{there[0]}: is there already; choose another --output, or replace it with --overwrite")

    def _journal(self) -> dict[str, Any] | None:
        """What an earlier run has left. Raises DataError if it is damaged."""
        path = self._folder / JOURNAL
        if not path.exists():
            return None
        try:
            with _writable(self._prefix):
                return json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error}); remove {self._folder} to begin anew") from error

    def _resumed(self, overwrite: bool) -> dict[str, dict[str, int]]:
        """Sizes of the files to go on with; empty to begin anew. Raises DataError."""
        journal = self._journal()
        if journal is None or (Position(*journal["progress"]["position"]) == Position() and not journal["finishing"]):
            return {}
        if different := _differences(journal["fingerprint"], self._fingerprint):
            if not overwrite:
                raise DataError(
                    f"{self._folder}: a stopped run that was given something else: {'; '.join(different)}; give the"
                    " same to go on with it, or --overwrite to begin anew"
                )
            (self._folder / JOURNAL).unlink()
            return {}
        self.finishing = journal["finishing"]
        self.progress = Progress(**journal["progress"])
        self.progress.position = Position(*journal["progress"]["position"])
        return journal["sizes"]


class _Spool:
    """The growing files of one key, cut back to `sizes`, or empty; `opened` closes them."""

    def __init__(self, path: Path, sizes: Mapping[str, int] | None, opened: ExitStack) -> None:
        self.sizes = dict(sizes or {"tokens": 0, "sequences": 0, "documents": 0})
        """Bytes of tokens, and counts."""
        self._path = path
        self._bin = _cut(_with(path, ".bin"), opened, 0, self.sizes["tokens"])
        self._idx = _cut(_with(path, ".idx"), opened, HEADER.size, LENGTH.itemsize * self.sizes["sequences"])
        self._ends = _cut(_with(path, ".ends"), opened, POINTER.itemsize, POINTER.itemsize * self.sizes["documents"])

    def write(self, part: Part) -> None:
        """Append documents."""
        raw = np.ascontiguousarray(part.tokens)
        self._bin.write(raw.data)
        self._idx.write(part.lengths.astype(LENGTH).tobytes())
        self._ends.write((self.sizes["sequences"] + np.cumsum(part.sequences)).astype(POINTER).tobytes())
        self.sizes["tokens"] += raw.nbytes
        self.sizes["sequences"] += len(part.lengths)
        self.sizes["documents"] += len(part.sequences)

    def sync(self) -> None:
        """To the disk."""
        for file in (self._bin, self._idx, self._ends):
            file.flush()
            os.fsync(file.fileno())

    def complete(self, dtype: np.dtype) -> None:
        """Pointers and ends of documents after the lengths, and the header before them."""
        self._idx.flush()
        self._ends.flush()
        end, count = 0, self.sizes["sequences"]
        with open(_with(self._path, ".idx"), "rb") as written:
            written.seek(HEADER.size)
            for start in range(0, count, CHUNK):
                raw = written.read(LENGTH.itemsize * min(CHUNK, count - start))
                ends = end + np.cumsum(np.frombuffer(raw, LENGTH).astype(np.int64) * dtype.itemsize)
                self._idx.write(np.concatenate([[end], ends[:-1]]).astype(POINTER).tobytes())
                end = int(ends[-1])
        with open(_with(self._path, ".ends"), "rb") as ends_file:
            shutil.copyfileobj(ends_file, self._idx, BUFFER)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], count, self.sizes["documents"] + 1))
        self._idx.flush()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file as a whole, durably."""
    temporary = _with(path, ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def _writable(prefix: str) -> Iterator[None]:
    """Raises DataError for a folder that cannot be written to."""
    try:
        yield
    except OSError as error:
        what = error.strerror or error
        raise DataError(f"{prefix}: cannot be written ({what}); check the folder, its permissions and space") from error


def _cut(path: Path, opened: ExitStack, head: int, size: int) -> IO[bytes]:
    """Open a file to append after a head, which is zeros in a new one, and `size` bytes more. Raises DataError."""
    file = open(path, "r+b" if path.exists() else "w+b", buffering=BUFFER)  # noqa: SIM115 - closed by `opened`
    opened.callback(_close, file)
    there = file.seek(0, os.SEEK_END)
    if size and there < head + size:
        raise DataError(
            f"{path}: has {there} bytes, but the journal says {head + size}; remove {path.parent} to begin anew"
        )
    file.truncate(head + size)
    file.seek(head + size)
    return file


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk, which has been told; what is not durable may be lost
        file.close()


def _publish(path: Path, name: str) -> None:
    """The pair's names. The index of an older pair goes first: it would not fit the new tokens."""
    if _is(_with(path, ".bin")):
        Path(f"{name}.idx").unlink(missing_ok=True)
        _rename(_with(path, ".bin"), f"{name}.bin")
    _rename(_with(path, ".idx"), f"{name}.idx")


def _rename(path: Path, name: str) -> None:
    """Durably; nothing if it was done before a kill."""
    if path.exists():
        os.replace(path, name)
        sync_folder(Path(name).parent)


def _with(path: Path, suffix: str) -> Path:
    return path.parent / (path.name + suffix)


def _is(path: str | Path) -> bool:
    return os.path.lexists(path)


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    names = [*new, *(x for x in old if x not in new)]
    return [
        f"{x} was {old.get(x, 'not there')}, is {new.get(x, 'not there')}" for x in names if old.get(x) != new.get(x)
    ]
