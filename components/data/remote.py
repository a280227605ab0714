"""Files of data in storage that fsspec reaches by a URL: `s3://`, `gs://`, `https://`, `hf://`, `memory://`, ...

A file is known by what its storage says of it: size, and version or checksum where there is one. Connections are made
where they are needed and never kept in a source: fsspec remembers them for each process by itself, and those of the
training process, with their thread, do not live on in a loader worker that is forked from it. Its packages repeat
requests that fail in passing; what they give up on stops the job (at a checkpoint), since to tell by their texts which
errors may pass is guesswork. Nothing is kept on the local disk: put `simplecache::` before the URL for that.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO

from components.data.watch import Found, Stamp, require_same, vanished
from components.runtime.errors import DataError
from components.runtime.urls import is_url, protocol_problem

CONTENTS = ("md5Hash", "crc32c", "checksum", "sha256", "blob_id", "ETag", "etag")
"""Names that file systems give to what depends on a file's content, the best first."""
VERSIONS = (*CONTENTS, "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""… and to what changes when it is written."""
MEND = "see that it can be reached from here, with credentials that may read there, on every machine"
LOCAL = ("file://", "local://")


def is_remote(path: str) -> bool:
    """Whether it is a URL of anything but a local file."""
    return is_url(path) and not path.startswith(LOCAL)


def local_path(path: str) -> str:
    """The path that a URL of a local file means; any other string as it is."""
    return next((path.removeprefix(x) for x in LOCAL if path.startswith(x)), path)


class RemoteFile:
    """A DataFile in storage. `url` reaches its file system, `path` is its name there, `info` what was listed of it."""

    __slots__ = ("content_tag", "path", "stamp", "url")

    def __init__(self, url: str, path: str, info: dict[str, Any]) -> None:
        self.url, self.path = url, path
        self.stamp = _stamp(info)
        self.content_tag = next((str(self.stamp.versions[x]) for x in CONTENTS if x in self.stamp.versions), None)

    def __str__(self) -> str:
        return _name(self.url, self.path)

    @property
    def name(self) -> str:
        """See DataFile."""
        return self.path.rpartition("/")[2]

    @property
    def location(self) -> str:
        """See DataFile."""
        return self.path

    def open(self) -> BinaryIO:
        """See DataFile."""
        with self.guarded():
            files = _connect(self.url)
            files.invalidate_cache()  # lists of before would tell what was
            file = files.open(self.path, "rb")
            require_same(self, _stamp(getattr(file, "details", None) or files.info(self.path)))
        return file

    def check(self) -> None:
        """See DataFile."""
        with self.guarded():
            files = _connect(self.url)
            files.invalidate_cache()
            require_same(self, _stamp(files.info(self.path)))

    def guarded(self) -> AbstractContextManager[None]:
        """See DataFile."""
        return reaching(self)


def list_files(url: str, patterns: Sequence[str] = (), told: str | None = None) -> Found:
    """The files that a URL names (a file, a folder, a glob), maybe none.

    In a folder, only what the first of `patterns` that matches anything does, if one does. Raises DataError: storage
    that cannot be reached, or whose package is not installed. `told`: what messages call it; None: `url`.
    """
    if problem := protocol_problem(url):
        raise DataError(f"{told or url}: {problem}")
    with reaching(told or url):
        files = _connect(url)
        path = _path(url).rstrip("/")
        make = partial(_listed, url)
        if _has_magic(path):
            return Found(make(files.glob(path, detail=True)), path.partition("*")[0].rpartition("/")[0])
        try:
            info = files.info(path)
        except FileNotFoundError:
            return Found([], path)
        if info["type"] != "directory":
            return Found([RemoteFile(url, path, info)], path.rpartition("/")[0])
        for pattern in patterns:
            if found := make(files.glob(f"{path}/{pattern}", detail=True)):
                return Found(found, path)
        return Found(make(files.find(path, detail=True)), path, everything=True)


@contextmanager
def reaching(place: object) -> Iterator[None]:
    """Turns whatever storage and its packages raise into a DataError that names the place."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{place}: {error}: install that package on every machine") from error
    except FileNotFoundError as error:
        raise vanished(place) from error
    except Exception as error:  # every package has its own
        text = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise DataError(f"{place}: cannot be read ({type(error).__name__}: {text}); {MEND}") from error


def _connect(url: str) -> Any:
    """The file system, an fsspec.AbstractFileSystem (whose annotations do not tell modes apart), of this process."""
    from fsspec.core import url_to_fs

    return url_to_fs(url)[0]


def _path(url: str) -> str:
    from fsspec.core import url_to_fs

    return str(url_to_fs(url)[1])


def _listed(url: str, infos: dict[str, dict[str, Any]]) -> list[RemoteFile]:
    return [RemoteFile(url, path, infos[path]) for path in sorted(infos) if infos[path]["type"] == "file"]


def _has_magic(path: str) -> bool:
    return any(x in path for x in ("*" if is_url(path) else "*?["))  # in https:// the others are a part of names


def _name(url: str, path: str) -> str:
    """How messages call a file: as a URL, where its name in storage is not one already."""
    protocol, _, rest = url.rpartition("://")
    return path if is_url(path) else f"{protocol}://{path if rest.startswith('/') else path.lstrip('/')}"


def _stamp(info: dict[str, Any]) -> Stamp:
    versions = {x: _plain(info[x]) for x in VERSIONS if info.get(x) is not None}
    return Stamp(-1 if info.get("size") is None else int(info["size"]), None, versions)


def _plain(value: object) -> str | int | float:
    """Lists of files and single answers write the same thing in different ways."""
    if isinstance(value, datetime):
        return value.timestamp()
    return value if isinstance(value, int | float) else str(value).strip('"')
