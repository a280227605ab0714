"""Which token files a path names: a prefix, a file, a folder or a glob, here or in storage.

`PREFIX`, `PREFIX.bin` and `PREFIX.idx` name the same pair. A prefix goes before a folder of the same name, since
Megatron-LM puts its caches there. A `.bin` alone has no index; but one among others that have is an index that was lost
or never finished, and is not guessed to be anything else.
"""

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from components.data.files import KINDS
from components.data.paths import find_path, roots
from components.data.remote import is_remote, list_files, local_path
from components.runtime.errors import DataError

PAIR = re.compile(r"\.(bin|idx)$")
OTHERS = tuple(x for extensions in KINDS.values() for x in extensions)


class TokenPath(NamedTuple):
    """One pair of files, or one file without an index."""

    name: str
    """Prefix, or path."""
    indexed: bool


def find_tokens(path: str) -> list[TokenPath]:
    """The token files that a path names, sorted. Raises DataError if there are none."""
    stem = PAIR.sub("", path)
    pair = [suffix for suffix in (".bin", ".idx") if _exists(stem + suffix, path)]
    if pair == [".bin"] and path.endswith(".bin"):
        return [TokenPath(_found(path), False)]
    if pair:
        return [TokenPath(PAIR.sub("", _found(stem + pair[0])), True)]
    if found := _sorted(_listed(path)):
        return found
    raise DataError(
        f"{path}: no token files there; allowed: the prefix of a pair .bin and .idx, a .bin without an index, or a"
        " folder or a glob of such files"
    )


def is_tokens(path: str) -> bool:
    """Whether a path names token files. A folder does if it holds an index, or `.bin` files and no other data files."""
    stem = PAIR.sub("", path)
    if any(_exists(stem + suffix, path) for suffix in (".bin", ".idx")):
        return True
    names = [x.lower() for x in _listed(path)]
    if any(x.endswith(".idx") for x in names):
        return True
    return any(x.endswith(".bin") for x in names) and not any(x.endswith(OTHERS) for x in names)


def _sorted(names: Iterable[str]) -> list[TokenPath]:
    """Pairs if there is any index, else files without one."""
    files = sorted(x for x in names if PAIR.search(x))
    if not any(x.endswith(".idx") for x in files):
        return [TokenPath(x, False) for x in files]
    return [TokenPath(x, True) for x in sorted({PAIR.sub("", x) for x in files})]


def _exists(path: str, given: str) -> bool:
    """Whether there is such a file; `given` is the path as the user wrote it."""
    if is_remote(path):
        return "*" not in path and [str(x) for x in list_files(path, told=given).files] == [path]
    found = find_path(local_path(path))
    return found is not None and found.is_file()


def _found(path: str) -> str:
    """The path, from where the process stands."""
    return path if is_remote(path) else str(find_path(local_path(path)) or path)


def _listed(path: str) -> list[str]:
    """The files in a folder, or that a glob matches; those in hidden folders are not data."""
    if is_remote(path):
        found = list_files(path)
        return [str(x) for x, name in zip(found.files, found.names(), strict=True) if "/." not in f"/{name}"]
    path = local_path(path)
    folder = find_path(path)
    if folder is not None and folder.is_dir():
        inside = (x for x in folder.rglob("*") if x.is_file())
        return [str(x) for x in inside if not any(y.startswith(".") for y in x.relative_to(folder).parts)]
    for root in roots() if glob.has_magic(path) else ():
        if names := glob.glob(str(root / Path(path).expanduser()), recursive=True):
            return [x for x in names if Path(x).is_file()]
    return []
