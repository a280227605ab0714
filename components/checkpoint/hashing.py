"""Hashes of files, by chunks of 64 MiB, so that threads and ranks share the work and an error says where it is.

xxh3_128 runs at the speed of memory (docs/benchmarks.md). It detects accidents, not malice:
whoever can change a file can change its hash. A cryptographic hash was rejected: it costs ten times as much, and
without a key it would promise no more. Torch-free.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import xxhash

ALGORITHM = "xxh3_128"
CHUNK_BYTES = 64 << 20
MAX_THREADS = 4  # a thread outruns most storage; ranks on one host share the cores
_READ_BYTES = 4 << 20


def chunk_count(size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Number of chunks of a file of `size` bytes; an empty file has none."""
    return -(-size // chunk_bytes)


class ChunkHasher:
    """Hashes a file while it is written from its beginning to its end."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._done: list[str] = []
        self._hasher = xxhash.xxh3_128()
        self.size = 0
        """Bytes so far."""

    def update(self, data: memoryview) -> None:
        """The next bytes of the file."""
        while data:
            part = data[: self._chunk_bytes - self.size % self._chunk_bytes]
            self._hasher.update(part)
            self.size += len(part)
            data = data[len(part) :]
            if self.size % self._chunk_bytes == 0:
                self._done.append(self._hasher.hexdigest())
                self._hasher = xxhash.xxh3_128()

    def hashes(self) -> list[str]:
        """Hash of each chunk so far, in hexadecimal, the last one shorter."""
        return [*self._done, self._hasher.hexdigest()] if self.size % self._chunk_bytes else [*self._done]


def hash_chunk(open_file: Callable[[], BinaryIO], index: int, chunk_bytes: int = CHUNK_BYTES) -> str:
    """Hash of one chunk of a file, in hexadecimal. Raises what opening and reading it do."""
    hasher, buffer, left = xxhash.xxh3_128(), memoryview(bytearray(min(_READ_BYTES, chunk_bytes))), chunk_bytes
    with open_file() as file:
        file.seek(index * chunk_bytes)
        while left and (count := file.readinto(buffer[:left])):  # pyrefly: ignore[missing-attribute]  # not in BinaryIO
            hasher.update(buffer[:count])
            left -= count
    return hasher.hexdigest()


def hash_chunks(
    chunks: Sequence[tuple[Callable[[], BinaryIO], int]], chunk_bytes: int = CHUNK_BYTES, threads: int = MAX_THREADS
) -> list[str]:
    """Hashes of (what opens the file, index of chunk), in order, computed in threads. Raises what reading does."""
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda chunk: hash_chunk(chunk[0], chunk[1], chunk_bytes), chunks))
