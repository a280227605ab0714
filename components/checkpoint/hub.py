"""Files of a model from the Hugging Face hub: one commit of it, resumed where a download stopped, every byte checked.

The library of the hub says what there is and reads ranges of it, with its own retries and its own way to a token. What
is fetched goes into a `.part` file named after the content, so that a download that was killed at any instant goes on
from its last block, and takes its name only once its hash is the one that the hub's metadata say. `hf_hub_download` was
rejected: it starts an interrupted file anew and does not hash what it has fetched; the price is its faster transfers
of large files (`hf_xet`). Nothing that the hub sends is trusted with a path: only plain names are fetched, and never
out of the folder. Torch-free; the library is imported once it is needed.
"""

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.checkpoint.hf_assets import ASSETS as TOKENIZER
from components.checkpoint.hf_assets import GENERATION
from components.checkpoint.hf_config import CONFIG
from components.checkpoint.manifest import is_plain
from components.checkpoint.safetensors import INDEX
from components.runtime.errors import DataError, EspalierError, ExitCode

ASSETS = {
    "tokenizer": TOKENIZER,
    "config": (CONFIG, GENERATION),
    "index": (INDEX,),
    "safetensors": (INDEX, "*.safetensors"),
}
"""What can be asked for, and the names of its files."""
BLOCK_BYTES = 16 << 20
"""Fetched by one request; what is lost of a download that is killed."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"


class DownloadError(EspalierError):
    """What was asked for is right, but did not come: the network, the disk, or bytes that are not the hub's."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub's metadata have it."""

    name: str
    """Its name, without a folder."""
    size: int
    """Bytes."""
    algorithm: str
    """"sha256", or "git" for a file that is kept in git: sha1 of a blob."""
    digest: str
    """What its hash must be."""


@dataclass(frozen=True)
class Fetched:
    """What is there after a download."""

    folder: Path
    """Where."""
    commit: str
    """The commit that it is of."""
    files: tuple[str, ...]
    """Names of the files, all verified."""

    @property
    def weights(self) -> bool:
        """Whether there are weights among them."""
        return any(name.endswith(".safetensors") for name in self.files)


def download(
    repo_id: str,
    revision: str,
    root: Path,
    assets: Sequence[str],
    patterns: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Fetch the files of these kinds (keys of ASSETS), and those that match the patterns, into `{root}/{name}`.

    `revision`: branch, tag or commit. Files that are there and whole stay. Raises DataError for a model, revision or
    kind of file that there is not or that the token may not read, DownloadError for anything else that went wrong. No
    message holds the token.
    """
    with _explained(repo_id, revision):
        from huggingface_hub import HfApi, HfFileSystem

        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        there = [file for sibling in info.siblings or () if (file := _remote(sibling)) is not None]
        folder, commit = root / repo_id.rpartition("/")[2], str(info.sha)
        folder.mkdir(parents=True, exist_ok=True)
        system = HfFileSystem(skip_instance_cache=True)
        fetch = _Fetch(lambda name: system.open(f"{repo_id}@{commit}/{name}", cache_type="none"), folder, tell)
        names = _wanted(there, assets, patterns, fetch, repo_id)
        files = [file for file in there if file.name in names]
        fetch.require_room(files)
        for file in files:
            fetch(file)
    return Fetched(folder, commit, tuple(file.name for file in files))


def _remote(sibling: Any) -> RemoteFile | None:
    """A file of the listing; None for what lies in a folder there, or has a name that is none. Raises DownloadError."""
    name, size = sibling.rfilename, sibling.size
    if not is_plain(name) or name.startswith("."):
        return None
    digest, algorithm = (sibling.lfs.sha256, "sha256") if sibling.lfs else (sibling.blob_id, "git")
    if size is None or not digest:
        raise DownloadError(f"the hub does not say size and hash of {name}: it could not be verified")
    return RemoteFile(name, size, algorithm, digest)


def _wanted(
    there: Sequence[RemoteFile], assets: Sequence[str], patterns: Sequence[str], fetch: "_Fetch", repo_id: str
) -> set[str]:
    """Names of the files to fetch. With an index, weights are those that it names: some models have them twice.

    Raises DataError for a kind or pattern that there is no file of.
    """
    found: set[str] = set()
    groups = [(f"assets {kind}", ASSETS[kind]) for kind in assets] + [
        (f"pattern {each!r}", (each,)) for each in patterns
    ]
    for what, group in groups:
        names = {file.name for file in there if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in group)}
        if not names:
            raise DataError(f"{repo_id} has no files of {what}; it has {_some(file.name for file in there)}")
        if group == ASSETS["safetensors"] and INDEX in names:
            index = next(file for file in there if file.name == INDEX)
            fetch(index)
            named = _named_files(fetch.folder / INDEX)
            if lost := named - names:
                raise DataError(f"{repo_id}: {INDEX} names {_some(lost)}, which it does not have")
            names = {INDEX} | named
        found |= names
    return found


def _named_files(path: Path) -> set[str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"].values()
        return {str(file) for file in files}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: no index of safetensors") from error


def _some(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


class _Fetch:
    """Fetches files into one folder. `open_remote`: name → a seekable file of the hub's."""

    def __init__(self, open_remote: Callable[[str], Any], folder: Path, tell: Callable[[str], None]) -> None:
        self._open, self.folder, self._tell = open_remote, folder, tell
        self._done: set[str] = set()

    def require_room(self, files: Sequence[RemoteFile]) -> None:
        """Raise DownloadError if what is still to come does not fit on the disk."""
        left = sum(file.size - self._held(file) for file in files)
        free = shutil.disk_usage(self.folder).free
        if left > free:
            raise DownloadError(f"{left / 1e9:.1f} GB are to come, but '{self.folder}' has {free / 1e9:.1f} GB free")

    def _held(self, file: RemoteFile) -> int:
        """Bytes of a file that are here already."""
        path = self.folder / file.name
        if path.is_file() and path.stat().st_size == file.size:
            return file.size
        part = self._part(file)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def _part(self, file: RemoteFile) -> Path:
        return self.folder / f".{file.name}.{file.digest[:16]}.part"

    def __call__(self, file: RemoteFile) -> None:
        """Have a file here, whole and verified. Raises DownloadError, OSError, and what the library raises."""
        if file.name in self._done:
            return
        path, what = self.folder / file.name, f"{file.name} ({file.size / 1e6:,.1f} MB)"
        if path.is_file() and path.stat().st_size == file.size and _digest(path, file) == file.digest:
            self._tell(f"{what}: is there already, and whole")
        else:
            began = self._fill(file)
            self._tell(f"{what}: {f'resumed at byte {began:,}' if began else 'fetched'}, verified")
        self._done.add(file.name)

    def _fill(self, file: RemoteFile) -> int:
        """Fetch what is not here yet; where it began."""
        part = self._part(file)
        with part.open("ab") as target:
            if (began := target.tell()) > file.size:
                began = target.seek(target.truncate(0))
            with self._open(file.name) as source:
                while (at := target.tell()) < file.size:
                    source.seek(at)
                    block = source.read(wanted := min(BLOCK_BYTES, file.size - at))
                    if len(block) > wanted:  # the whole file: caches may ignore ranges of what can be compressed
                        block = block[at:]
                    if not block:
                        raise DownloadError(f"{file.name}: the hub sends nothing after byte {at:,} of {file.size:,}")
                    target.write(block)
                    target.flush()
            os.fsync(target.fileno())
        if (found := _digest(part, file)) != file.digest:
            part.unlink()
            raise DownloadError(
                f"{file.name}: its hash is {found}, the hub's metadata say {file.digest}: it was damaged on its way and"
                " has been deleted; run the same command again"
            )
        part.replace(self.folder / file.name)
        return began


def _digest(path: Path, file: RemoteFile) -> str:
    """The hash of a file here, as the hub takes it of that one."""
    hasher = hashlib.sha256() if file.algorithm == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn whatever goes wrong into an error of ours, without the token and without a cause that could hold it."""
    try:
        yield
    except EspalierError:
        raise
    except Exception as error:  # the library's, and those of its HTTP client, which is not the same in all versions
        explained = _explain(error, repo_id, revision)
        raise type(explained)(_redacted(str(explained))) from None


def _explain(error: Exception, repo_id: str, revision: str) -> EspalierError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return DataError(f"{repo_id} is gated: ask for access on its page, then {_LOGIN} as a user who has it")
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of it")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(f"{repo_id}: no such model on the hub, or it is private: check the name, or {_LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return DataError(f"{repo_id!r} is no name of a model; it looks like owner/name")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return DataError(f"{repo_id}: the hub refuses to give it (status {status}): {_LOGIN} as a user who may read it")
    if isinstance(error, OSError) and error.errno in _FULL:
        return DownloadError(f"the disk is full ({error.strerror}): free space, and run the same command again")
    first = (str(error).splitlines() or [""])[0]
    return DownloadError(
        f"{repo_id}: {type(error).__name__}: {first}; check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), and run the"
        " same command again: it goes on where it stopped"
    )


def _redacted(text: str) -> str:
    """The text without any token that may have been sent."""
    from huggingface_hub import get_token

    tokens = [os.environ.get(name) for name in _TOKENS]
    try:
        tokens.append(get_token())
    except Exception as error:  # a login that is broken must not hide what went wrong
        text = f"{text} (and the login cannot be read: {type(error).__name__})"
    for token in tokens:
        for form in {token, token.strip(), repr(token)[1:-1]} if token and token.strip() else ():
            text = text.replace(form, "***")
    return text
