"""Writes `PREFIX.bin` and `PREFIX.idx`, byte for byte as Megatron-LM does, in memory that does not grow with them.

Both are written under fresh temporary names, fsynced and renamed, the index last: a prefix without `.idx` is no
dataset, so whatever kills the writer leaves the old files or none. Lengths go straight to where the index has them;
pointers, which follow from them, are made at the end; only the document boundaries wait in an unnamed file.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from components.data.remote import is_remote, local_path
from components.data.token_bytes import BYTE
from components.data.token_index import CHUNK, CODES, HEADER, LENGTH, MAGIC, MODE, POINTER, VERSION, open_index
from components.runtime.durable import sync_folder
from components.runtime.errors import DataError

LONGEST = np.iinfo(LENGTH).max
BUFFER = 1 << 20


class IndexedWriter:
    """Writes one pair of files; a context manager that finishes, or discards what it wrote when an error passes.

    Args:
        prefix: Path without `.bin` or `.idx`; its folder is made.
        dtype: Of the tokens: one of Megatron's, see `token_dtype`.
        overwrite: Replace files that are there; else they are an error.
        modes: Write a mode for each sequence, as for multimodal data.

    Raises DataError: files that are there, a dtype that the format has not, a folder that cannot be written to.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype | type, *, overwrite: bool = False, modes: bool = False
    ) -> None:
        self.prefix, self.dtype, self._overwrite = local_path(str(prefix)), np.dtype(dtype).newbyteorder("<"), overwrite
        if self.dtype not in CODES:
            allowed = ", ".join(x.name for x in CODES)
            raise DataError(f"{prefix}: token files of {self.dtype.name} cannot be written; allowed: {allowed}")
        if is_remote(self.prefix):
            raise DataError(f"{prefix}: token files are written to local folders only; write there and copy both files")
        self.tokens = self.sequences = self.documents = 0
        self._refuse()
        self._temporary = {x: f"{self.prefix}{x}.{os.getpid()}-{secrets.token_hex(4)}.tmp" for x in (".bin", ".idx")}
        self._open: list[IO[bytes]] = []
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin, self._idx = (self._file(x) for x in (".bin", ".idx"))
            self._boundaries, self._modes = self._spool(), self._spool() if modes else None
        except OSError as error:
            self.discard()
            raise _unwritable(self.prefix, error) from error
        self._idx.write(bytes(HEADER.size))
        self._boundaries.write(bytes(POINTER.itemsize))

    def add_document(
        self,
        ids: np.ndarray | Sequence[int],
        sequence_lengths: Sequence[int] | np.ndarray | None = None,
        modes: Sequence[int] | None = None,
    ) -> None:
        """Append one document: token ids, and the lengths of the sequences that they are; None: one, if any.

        Raises DataError: ids that the dtype does not hold, lengths that are not those of the ids. # (tokens,)
        """
        ids = np.asarray(ids)
        lengths = [len(ids)] * bool(len(ids)) if sequence_lengths is None else sequence_lengths
        self.add_documents(ids, lengths, [len(lengths)], modes)

    def add_documents(
        self,
        ids: np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        sequences: Sequence[int] | np.ndarray | None = None,
        modes: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Append many documents at once, which costs much less than one by one.

        Args:
            ids: Of all documents, one after the other. # (tokens,)
            lengths: Tokens of each sequence. # (sequences,)
            sequences: How many of them each document has; None: each is a document, and an empty one has none.
            modes: Of each sequence, if the files have modes.

        Raises DataError as `add_document` does; nothing of the call has been written then.
        """
        raw, lengths = self._narrow(np.asarray(ids)), np.asarray(lengths, np.int64)
        if sequences is None:
            sequences, lengths = lengths > 0, lengths[lengths > 0]
        counts = np.asarray(sequences, np.int64)
        self._check(raw, lengths, counts, modes)
        try:
            if modes is not None and self._modes is not None:
                self._modes.write(np.asarray(modes).astype(MODE).tobytes())
            self._bin.write(raw.data)
            self._idx.write(lengths.astype(LENGTH).tobytes())
            self._boundaries.write((self.sequences + np.cumsum(counts)).astype(POINTER).tobytes())
        except OSError as error:
            raise _unwritable(self.prefix, error) from error
        self.tokens += len(raw)
        self.sequences += len(lengths)
        self.documents += len(counts)

    def add_file(self, prefix: str | Path) -> None:
        """Append all documents of a pair of files of the same dtype. Raises DataError."""
        index, tokens = open_index(str(prefix))
        header = index.header
        if header.dtype != self.dtype or header.modes != (self._modes is not None):
            raise DataError(
                f"{prefix}: holds {_kind(header.dtype, header.modes)}, {self.prefix} gets"
                f" {_kind(self.dtype, self._modes is not None)}; put together files of one kind"
            )
        try:
            for start, stop in _pieces(tokens.size):
                self._bin.write(tokens.array(BYTE, start, stop - start).data)
            for start, stop in _pieces(header.sequences):
                index.check()
                self._idx.write(index.lengths[start:stop].tobytes())
                if self._modes is not None and index.modes is not None:
                    self._modes.write(index.modes[start:stop].tobytes())
            for start, stop in _pieces(header.documents):
                index.check()
                self._boundaries.write((index.documents[start + 1 : stop + 1] + self.sequences).tobytes())
        except OSError as error:
            raise _unwritable(self.prefix, error) from error
        self.tokens += tokens.size // self.dtype.itemsize
        self.sequences += header.sequences
        self.documents += header.documents

    def finish(self) -> None:
        """Make the files durable and give them their names. Raises DataError; the old files, or none, are there then.

        Files that are to be replaced vanish just before: the old index would not fit the new tokens.
        """
        try:
            self._complete()
            for file in (self._bin, self._idx):
                file.flush()
                os.fsync(file.fileno())
            self._refuse()
            folder = Path(self.prefix).parent
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            for suffix in (".bin", ".idx"):
                os.replace(self._temporary[suffix], self.prefix + suffix)
                sync_folder(folder)
        except OSError as error:
            raise _unwritable(self.prefix, error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, if it is not finished."""
        for file in self._open:
            with suppress(OSError):  # a full disk fails again at what is still to be written, and thrown away here
                file.close()
        for path in self._temporary.values():
            if os.path.lexists(path):
                os.unlink(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def _complete(self) -> None:
        """Pointers, boundaries and modes after the lengths, and the header before them."""
        self._idx.flush()
        end = 0
        with open(self._temporary[".idx"], "rb") as written:
            written.seek(HEADER.size)
            for start, stop in _pieces(self.sequences):
                raw = written.read(LENGTH.itemsize * (stop - start))
                lengths = np.frombuffer(raw, LENGTH).astype(np.int64) * self.dtype.itemsize
                ends = end + np.cumsum(lengths)
                self._idx.write((ends - lengths).astype(POINTER).tobytes())
                end = int(ends[-1])
        for spool in (self._boundaries, self._modes):
            if spool is not None:
                spool.seek(0)
                shutil.copyfileobj(spool, self._idx, BUFFER)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.documents + 1))

    def _check(self, ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray, modes: Any) -> None:
        where = f"{self.prefix}: document {self.documents}"
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= LONGEST:
            raise DataError(
                f"{where} or later: sequence lengths from {lengths.min()} to {lengths.max()}; 0 to {LONGEST}"
            )
        if int(lengths.sum()) != len(ids):
            raise DataError(f"{where} or later: sequences of {lengths.sum()} tokens in all, but {len(ids)} token ids")
        if (len(counts) and counts.min() < 0) or int(counts.sum()) != len(lengths):
            raise DataError(f"{where} or later: documents of {counts.sum()} sequences, but {len(lengths)} lengths")
        if (modes is not None) != (self._modes is not None) or (modes is not None and len(modes) != len(lengths)):
            given = "none" if modes is None else str(len(modes))
            wanted = "none" if self._modes is None else str(len(lengths))
            raise DataError(f"{where} or later: {given} modes of sequences; wanted: {wanted}")

    def _narrow(self, ids: np.ndarray) -> np.ndarray:
        """The ids in the dtype of the file. Raises DataError for one that it does not hold."""
        if ids.dtype != self.dtype and len(ids) and self.dtype.kind in "iu":
            info = np.iinfo(self.dtype)
            if ids.dtype.kind not in "iu" or not info.min <= int(ids.min()) <= int(ids.max()) <= info.max:
                raise DataError(
                    f"{self.prefix}: document {self.documents} or later: token ids from {ids.min()} to {ids.max()},"
                    f" {ids.dtype.name}; {self.dtype.name} holds whole numbers from {info.min} to {info.max}"
                )
        return np.ascontiguousarray(ids.astype(self.dtype, copy=False))

    def _refuse(self) -> None:
        for suffix in () if self._overwrite else (".bin", ".idx"):
            if os.path.lexists(self.prefix + suffix):
                raise DataError(f"{self.prefix}{suffix}: is there already; choose another prefix, or remove both files")

    def _file(self, suffix: str) -> IO[bytes]:
        file = open(self._temporary[suffix], "xb", buffering=BUFFER)  # noqa: SIM115 - closed by discard
        self._open.append(file)
        return file

    def _spool(self) -> IO[bytes]:
        file = tempfile.TemporaryFile(dir=Path(self.prefix).parent, buffering=BUFFER)  # noqa: SIM115 - likewise
        self._open.append(file)
        return file


def _kind(dtype: np.dtype, modes: bool) -> str:
    return dtype.name + (" with modes" if modes else "")


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    return ((x, min(x + CHUNK, count)) for x in range(0, count, CHUNK))


def _unwritable(prefix: str, error: OSError) -> DataError:
    what = error.strerror or error
    return DataError(f"{prefix}: token files cannot be written ({what}); check the folder, its permissions and space")
