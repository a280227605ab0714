"""Hashes of files, by chunks of 64 MiB, so that threads and ranks share the work and an error says where it is.

xxh3_128 runs at the speed of memory (about 5 GB/s a thread from the page cache). It detects accidents, not malice:
whoever can change a file can change its hash. A cryptographic hash was rejected: it costs ten times as much, and
without a key it would promise no more.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

ALGORITHM = "xxh3_128"
CHUNK_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_MAX_THREADS = 4  # a thread outruns most storage; ranks on one host share the cores


def chunk_count(size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Number of chunks of a file of `size` bytes; an empty file has none."""
    return -(-size // chunk_bytes)


def hash_chunk(path: Path, index: int, chunk_bytes: int = CHUNK_BYTES) -> str:
    """Hash of one chunk, in hexadecimal. A symbolic link is not followed. Raises OSError."""
    hasher, buffer, left = xxhash.xxh3_128(), memoryview(bytearray(min(_READ_BYTES, chunk_bytes))), chunk_bytes
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        file.seek(index * chunk_bytes)
        while left and (count := file.readinto(buffer[:left])):
            hasher.update(buffer[:count])
            left -= count
    return hasher.hexdigest()


def hash_chunks(chunks: Iterable[tuple[Path, int]], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """Hashes of (file, index of chunk), in order, computed in threads. Raises OSError."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda chunk: hash_chunk(chunk[0], chunk[1], chunk_bytes), chunks))
