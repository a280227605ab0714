"""Local data by path: a file, a folder or a glob of JSON lines, Parquet or text files, in sorted order.

The extension says what a file is. A folder with more than one kind is refused rather than guessed at; files of unknown
extension inside a folder, and hidden ones, are not data.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

from components.data.documents import RandomAccess, Sequential
from components.data.jsonlines import JsonLines, JsonLinesStream
from components.data.parquet import Parquet
from components.data.paths import find_path, roots
from components.data.textfiles import TextFiles
from components.runtime.errors import DataError

JSON_LINES = tuple(a + b for a in (".jsonl", ".json") for b in ("", ".gz", ".zst"))
KINDS = {"JSON lines": JSON_LINES, "Parquet": (".parquet",), "text": (".txt", ".text", ".md", ".rst", ".py")}
ALLOWED = ", ".join(x for extensions in KINDS.values() for x in extensions)


def open_files(path: str, field: str, patterns: Sequence[str] = ()) -> RandomAccess | Sequential:
    """The documents at `path`. In a folder, only what the first of `patterns` that matches anything does, if one does.

    Raises DataError: nothing there, unknown extension, several kinds, files that cannot be read or hold nothing.
    """
    files = _expand(path, patterns)
    kinds = {x: _kind(x) for x in files}
    for file, kind in kinds.items():
        if kind is None:
            raise DataError(f"{file}: unknown extension {file.suffix!r}; allowed: {ALLOWED}")
    if len(set(kinds.values())) > 1:
        found = " and ".join(sorted({str(x) for x in kinds.values()}))
        raise DataError(
            f"{path}: holds files of several kinds ({found}); give a glob of one kind, such as '{path}/*.jsonl'"
        )
    match kinds[files[0]]:
        case "Parquet":
            return Parquet(files, field)
        case "text":
            return TextFiles(files)
    compressed = any(x.suffix in (".gz", ".zst") for x in files)
    return JsonLinesStream(files, field) if compressed else JsonLines(files, field)


def is_local(path: str) -> bool:
    """Whether something of that name exists, or it is a glob."""
    return find_path(path) is not None or glob.has_magic(path)


def _kind(path: Path) -> str | None:
    return next((kind for kind, extensions in KINDS.items() if path.name.lower().endswith(extensions)), None)


def _expand(path: str, patterns: Sequence[str]) -> list[Path]:
    """The files that a path names, sorted. Raises DataError if there are none."""
    found = find_path(path)
    if found is None:
        return _glob(path)
    if found.is_file():
        return [found]
    for pattern in patterns:
        if files := sorted(x for x in found.glob(pattern) if x.is_file()):
            return files
    inside = (x for x in found.rglob("*") if x.is_file() and _kind(x))
    files = [x for x in inside if not any(part.startswith(".") for part in x.relative_to(found).parts)]
    if not files:
        raise DataError(f"{path}: no data files in this folder; allowed extensions: {ALLOWED}")
    return sorted(files, key=lambda x: x.relative_to(found).as_posix())


def _glob(path: str) -> list[Path]:
    for root in roots() if glob.has_magic(path) else ():
        pattern = str(root / Path(path).expanduser())
        if files := sorted(x for x in map(Path, glob.glob(pattern, recursive=True)) if x.is_file()):
            return files
    places = "the current folder and the project's"
    raise DataError(
        f"{path}: no such file or folder (looked in {places}); check training.dataset_path or validation.dataset_path"
    )
