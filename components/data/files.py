"""Data by path or URL: a file, a folder or a glob of JSON lines, Parquet or text files, in sorted order.

The extension says what a file is. A folder with more than one kind is refused rather than guessed at; files of unknown
extension inside a folder, and hidden ones, are not data. Where several splits or subsets lie in one folder, the names
of folders and files tell which is which, as on the Hugging Face hub.
"""

import glob
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath

from components.data.documents import RandomAccess, Sequential
from components.data.jsonlines import JsonLines, JsonLinesStream
from components.data.parquet import Parquet
from components.data.paths import find_path, roots
from components.data.remote import is_remote, list_files, local_path
from components.data.textfiles import TextFiles
from components.data.watch import DataFile, Found, LocalFile
from components.runtime.errors import DataError
from components.runtime.logging import logger, prints_messages

JSON_LINES = tuple(a + b for a in (".jsonl", ".json") for b in ("", ".gz", ".zst"))
KINDS = {"JSON lines": JSON_LINES, "Parquet": (".parquet",), "text": (".txt", ".text", ".md", ".rst", ".py")}
ALLOWED = ", ".join(x for extensions in KINDS.values() for x in extensions)
LISTED = 8


def open_files(
    path: str,
    fields: Sequence[str] | None = None,
    patterns: Sequence[str] = (),
    split: str | None = None,
    subset: str | None = None,
) -> RandomAccess | Sequential:
    """The documents at a path or URL: mappings of fields, or texts where a file is one document.

    Args:
        path: A file, folder, glob or URL.
        fields: What will be read of each record, for files that need not be read whole; None: everything.
        patterns: In a folder, only what the first of them that matches anything does, if one does.
        split: Only files that have this word in their name, or in that of a folder inside `path`.
        subset: Likewise.

    Raises DataError: nothing there, unknown extension, several kinds, files that cannot be read or hold nothing.
    """
    found = _expand(path, patterns)
    for word in (subset, split):
        found = _named(path, found, word) if word else found
    files = _with_content(path, found.files)
    fields = (fields,) if isinstance(fields, str) else fields  # which is a sequence, too
    match _kind_of_all(path, files):
        case "Parquet":
            return Parquet(files, fields)
        case "text":
            return TextFiles(files)
    plain = [x for x in files if isinstance(x, LocalFile) and not x.name.endswith((".gz", ".zst"))]
    return JsonLines(plain) if len(plain) == len(files) else JsonLinesStream(files)


def _with_content(path: str, files: Sequence[DataFile]) -> Sequence[DataFile]:
    """Without files of no bytes, which are told of. Raises DataError if all are so.

    A text file without a byte is no document either. What such a file holds later belongs to another job.
    """
    empty = [str(x) for x in files if not x.stamp.size]
    if len(empty) == len(files):
        raise DataError(f"{path}: no records in {len(files)} file(s), all empty; give a dataset that is not empty")
    if empty and prints_messages():
        listed = ", ".join(empty[:LISTED]) + (", …" if len(empty) > LISTED else "")
        logger.warning("%s: nothing is read of %d empty file(s): %s", path, len(empty), listed)
    return [x for x in files if x.stamp.size]


def is_local(path: str) -> bool:
    """Whether something of that name exists, or it is a glob."""
    return find_path(path) is not None or glob.has_magic(path)


def _kind(name: str) -> str | None:
    return next((kind for kind, extensions in KINDS.items() if name.lower().endswith(extensions)), None)


def _kind_of_all(path: str, files: Sequence[DataFile]) -> str:
    """What the files are. Raises DataError unless all are the same."""
    kinds = {x: _kind(x.name) for x in files}
    for file, kind in kinds.items():
        if kind is None:
            raise DataError(f"{file}: unknown extension {PurePosixPath(file.name).suffix!r}; allowed: {ALLOWED}")
    found = sorted({str(x) for x in kinds.values()})
    if len(found) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({' and '.join(found)}); give a glob of one kind, such as"
            f" '{path}/*.jsonl'"
        )
    return found[0]


def _named(path: str, found: Found, word: str) -> Found:
    """Those files in whose names, below the folder, the word stands. Raises DataError if there are none."""
    pattern = re.compile(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])")
    names = found.names()
    files = [file for file, name in zip(found.files, names, strict=True) if pattern.search(name)]
    if not files:
        listed = ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
        raise DataError(f"{path}: no file or folder there is named after {word!r} (files: {listed})")
    return found._replace(files=files)


def _expand(path: str, patterns: Sequence[str]) -> Found:
    """The files that a path or URL names. Raises DataError if there are none."""
    if is_remote(path):
        found = list_files(path, patterns)
        if not found.files:
            raise DataError(f"{path}: nothing is there; check dataset_path, or the path of the source")
    else:
        found = _expand_local(local_path(path), patterns)
    if not found.everything:
        return found
    pairs = zip(found.files, found.names(), strict=True)
    files = [file for file, name in pairs if _kind(name) and "/." not in f"/{name}"]
    if not files:
        raise DataError(f"{path}: no data files in this folder; allowed extensions: {ALLOWED}")
    return found._replace(files=files)


def _expand_local(path: str, patterns: Sequence[str]) -> Found:
    found = find_path(path)
    if found is None:
        return _glob(path)
    folder = found.absolute()
    if found.is_file():
        return Found([LocalFile(found)], folder.parent.as_posix())
    for pattern in patterns:
        if chosen := sorted(x for x in found.glob(pattern) if x.is_file()):
            return Found([LocalFile(x) for x in chosen], folder.as_posix())
    inside = sorted((x for x in found.rglob("*") if x.is_file()), key=lambda x: x.relative_to(found).as_posix())
    return Found([LocalFile(x) for x in inside if _kind(x.name)], folder.as_posix(), everything=True)


def _glob(path: str) -> Found:
    for root in roots() if glob.has_magic(path) else ():
        pattern = root / Path(path).expanduser()
        if files := sorted(x for x in map(Path, glob.glob(str(pattern), recursive=True)) if x.is_file()):
            folder = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.absolute().parts))
            return Found([LocalFile(x) for x in files], folder.as_posix())
    places = "the current folder and the project's"
    raise DataError(
        f"{path}: no such file or folder (looked in {places}); check dataset_path, or the path of the source"
    )
