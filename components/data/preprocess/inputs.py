"""What is to be encoded: files of JSON lines, Parquet or text, cut into chunks of about a megabyte.

Plain JSON lines here are cut by looking for the next newline, and read by whoever encodes them, so that the process
that deals the work has next to nothing to do. Compressed files, Parquet, standard input and what lies in storage are
read from front to back: there a chunk carries its content. Where chunks are cut has no influence on what is written.
"""

import glob
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from components.data.compressed import CODECS, PIECE, Damaged, decompressed
from components.data.paths import roots
from components.data.preprocess.parquet import batches
from components.data.remote import is_remote, list_files, local_path
from components.data.watch import DataFile, Found, LocalFile, Stamp, changed
from components.runtime.errors import DataError

LINES, ROWS, TEXT = "JSON lines", "Parquet", "text"
EXTENSIONS = {".jsonl": LINES, ".json": LINES, ".parquet": ROWS} | dict.fromkeys(
    (".txt", ".text", ".md", ".rst", ".py"), TEXT
)
ALLOWED = f"{', '.join(EXTENSIONS)}; all but .parquet also with {' or '.join(CODECS)} after it"
STDIN = "-"
OWN = re.compile(r"\.report\.json$|\.partial/")
"""What a job leaves beside its output, which may be in a folder that is read."""
BLOCK = 1 << 20
FILES_AT_ONCE = 256


class Input(NamedTuple):
    """One file. `codec` is its compression's extension or empty; size in bytes."""

    file: DataFile
    kind: str
    codec: str

    @property
    def size(self) -> int:
        """Bytes on disk; none where nobody knows."""
        return max(self.file.stamp.size, 0)


class Position(NamedTuple):
    """Where to go on: file, byte (decompressed) or row in it, and lines before that."""

    file: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Chunk:
    """Whole records of one file, or several whole text files."""

    kind: str
    """LINES, ROWS or TEXT."""
    files: tuple[DataFile, ...]
    """One, or several of text."""
    first: int
    """Number of the first of them."""
    start: int
    """First byte (decompressed), or row of the file."""
    stop: int
    """Byte or row after the last."""
    last: bool
    """Nothing of the file follows."""
    read: int
    """Bytes on disk of its files that have been read at its end, for progress."""
    size: int
    """Bytes of content, to bound what is under way."""
    raw: bytes | None = None
    """Content: of a file, bytes of lines, or an Arrow stream of rows. None: to be read from the files."""
    group: tuple[int, int] = (0, 0)
    """Rows: number of the row group, and its first row."""
    damage: str = ""
    """Why nothing follows, where the compressed file is damaged from here on."""

    def after(self, line: int) -> Position:
        """Where to go on after it. `line`: lines of the file up to there."""
        return Position(self.first + len(self.files)) if self.last else Position(self.first, self.stop, line)

    def __str__(self) -> str:
        if self.kind == TEXT:
            return f"{self.files[0]}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        return f"{self.files[0]}, {'rows' if self.kind == ROWS else 'bytes'} {self.start} to {self.stop}"


class StandardInput:
    """A DataFile that can be read once."""

    name, location, stamp, content_tag = STDIN, STDIN, Stamp(-1, None, {}), None

    def __str__(self) -> str:
        return "standard input"

    def open(self) -> BinaryIO:
        """See DataFile."""
        return sys.stdin.buffer

    def check(self) -> None:
        """Nothing: it cannot be looked at."""

    def guarded(self) -> AbstractContextManager[None]:
        """Nothing to tell that Python would not."""
        return nullcontext()


def find_inputs(paths: Sequence[str]) -> list[Input]:
    """The files that paths, URLs, folders and globs name: in the order given, sorted inside each.

    Raises DataError: nothing there, unknown extension, no data files in a folder.
    """
    if STDIN in paths:
        if len(paths) > 1:
            raise DataError("--input -: standard input cannot be joined with files; give it alone")
        return [Input(StandardInput(), LINES, "")]
    return [_input(file) for path in paths for file in _expand(path)]


def fingerprint(inputs: Sequence[Input]) -> str:
    """Number, size and digest of the files: where, how long, written when. Cheap, so without reading them."""
    lines = [f"{x.file.location} {x.size} {sorted(x.file.stamp.versions.items())}" for x in inputs]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return f"{len(inputs)} files, {sum(x.size for x in inputs)} bytes, {digest}"


def chunks(inputs: Sequence[Input], keys: Sequence[str], size: int, position: Position) -> Iterator[Chunk]:
    """All chunks from a position on, each of about `size` bytes, or of one longer record. Raises DataError."""
    number, offset = position.file, position.offset
    while number < len(inputs):
        here = inputs[number]
        if here.kind == TEXT:
            yield (texts := _texts(inputs, number, size))
            number += len(texts.files)
            continue
        yield from _file(here, number, keys, size, offset)
        number, offset = number + 1, 0


def _file(here: Input, number: int, keys: Sequence[str], size: int, offset: int) -> Iterator[Chunk]:
    if here.kind == ROWS:
        return _rows(here, number, keys, size, offset)
    if isinstance(here.file, LocalFile) and not here.codec:
        return _spans(here, number, size, offset)
    return _stream(here, number, size, offset)


def _spans(here: Input, number: int, size: int, start: int) -> Iterator[Chunk]:
    """Chunks of a plain file of lines, without reading them."""
    with here.file.open() as opened, here.file.guarded():
        while start < here.size:
            stop = _line_end(opened, here, start + size)
            yield Chunk(LINES, (here.file,), number, start, stop, stop == here.size, stop, stop - start)
            start = stop


def _line_end(opened: BinaryIO, here: Input, at: int) -> int:
    """The byte after the first newline from byte `at - 1` on, or the end of the file."""
    at -= 1
    opened.seek(at)
    while at < here.size:
        block = opened.read(BLOCK)
        if not block:
            raise changed(here.file, "was truncated")
        if (found := block.find(b"\n")) >= 0:
            return min(at + found + 1, here.size)
        at += len(block)
    return here.size


def _stream(here: Input, number: int, size: int, start: int) -> Iterator[Chunk]:
    """Chunks of lines read from front to back; what lies before byte `start` is passed over."""
    file = here.file
    with closing(file.open()) as opened, file.guarded():
        held, damage = _Held(start), ""
        told = not isinstance(file, StandardInput)
        try:
            for block in decompressed(iter(partial(opened.read, PIECE[here.codec]), b""), here.codec):
                if raw := held.take(block, size):
                    read = opened.tell() if told else 0
                    yield Chunk(LINES, (file,), number, held.at - len(raw), held.at, False, read, len(raw), raw)
        except Damaged as error:
            damage = str(error)
        if (raw := held.rest()) or damage:
            stop = held.at + len(raw)
            yield Chunk(LINES, (file,), number, held.at, stop, True, here.size, len(raw), raw, damage=damage)


class _Held:
    """Blocks of a stream until there are enough lines for a chunk, from byte `at` on."""

    def __init__(self, start: int) -> None:
        self.at = start
        self._passed, self._start = 0, start
        self._parts: list[bytes] = []
        self._size = 0

    def take(self, block: bytes, size: int) -> bytes:
        """One more block; whole lines if there are `size` bytes of them, which `at` then stands after."""
        skipped = min(max(self._start - self._passed, 0), len(block))
        self._passed += len(block)
        block = block[skipped:] if skipped else block
        self._parts.append(block)
        self._size += len(block)
        cut = block.rfind(b"\n") + 1
        if self._size < size or not cut:
            return b""
        raw = b"".join([*self._parts[:-1], block[:cut]])
        self._parts, self._size = [block[cut:]], len(block) - cut
        self.at += len(raw)
        return raw

    def rest(self) -> bytes:
        """What is left."""
        return b"".join(self._parts)


def _rows(here: Input, number: int, keys: Sequence[str], size: int, start: int) -> Iterator[Chunk]:
    for batch in batches(here.file, keys, size, start):
        stop = batch.first + batch.rows
        read, last = here.size * stop // batch.total, stop == batch.total
        files, raw = (here.file,), batch.raw
        yield Chunk(ROWS, files, number, batch.first, stop, last, read, len(raw), raw, batch.group)


def _texts(inputs: Sequence[Input], first: int, size: int) -> Chunk:
    """The next text files, until they have `size` bytes."""
    last, held = first + 1, inputs[first].size
    while last < min(len(inputs), first + FILES_AT_ONCE) and inputs[last].kind == TEXT and held < size:
        held += inputs[last].size
        last += 1
    files = tuple(x.file for x in inputs[first:last])
    return Chunk(TEXT, files, first, 0, 0, True, held, held)


def _input(file: DataFile) -> Input:
    """Raises DataError for an unknown extension."""
    kind, codec = kind_of(file.name)
    if kind is None:
        raise DataError(f"{file}: unknown extension {PurePosixPath(file.name).suffix!r}; allowed: {ALLOWED}")
    return Input(file, kind, codec)


def kind_of(name: str) -> tuple[str | None, str]:
    """What a file is, by its extension, and its compression."""
    suffix = PurePosixPath(name).suffix.lower()
    codec = suffix if suffix in CODECS else ""
    kind = EXTENSIONS.get(PurePosixPath(PurePosixPath(name).stem).suffix.lower() if codec else suffix)
    return (None if codec and kind == ROWS else kind), codec


def _expand(path: str) -> Sequence[DataFile]:
    """The files that one path names. Raises DataError if there are none."""
    found = list_files(path) if is_remote(path) else _local(local_path(path))
    files = found.files
    if found.everything:
        pairs = zip(files, found.names(), strict=True)
        files = [
            file for file, name in pairs if kind_of(file.name)[0] and "/." not in f"/{name}" and not OWN.search(name)
        ]
        if not files:
            raise DataError(f"--input {path}: no data files in this folder; allowed extensions: {ALLOWED}")
    if not files:
        raise DataError(f"--input {path}: no such file or folder (looked in the current folder and the project's)")
    return files


def _local(path: str) -> Found:
    for root in roots():
        full = root / Path(path).expanduser()
        if full.is_dir():
            inside = sorted((x for x in full.rglob("*") if x.is_file()), key=lambda x: x.relative_to(full).as_posix())
            return Found([LocalFile(x) for x in inside], full.absolute().as_posix(), everything=True)
        if full.exists():
            return Found([LocalFile(full)], "")
        if glob.has_magic(path) and (found := sorted(glob.glob(str(full), recursive=True))):
            return Found([LocalFile(x) for x in map(Path, found) if x.is_file()], "")
    return Found([], "")
