"""Digests of token files: of all that says where documents lie, and of a sample of what they hold.

A corpus that was tokenized again differs nearly everywhere, so a sample finds it; a single changed token in a large
file it does not find. Reading everything was rejected: a terabyte takes minutes, at each start of each rank.
"""

from collections.abc import Sequence

import xxhash

from components.data.token_bytes import BYTE, TokenBytes

SAMPLE, SAMPLES = 4096, 64  # bytes in a block, and blocks
CHUNK = 1 << 23


def hash_parts(parts: Sequence[bytes]) -> bytes:
    """One digest of several byte strings; where one ends matters."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def hash_all(file: TokenBytes) -> bytes:
    """Digest of every byte, at several GB/s."""
    digest = xxhash.xxh3_128()
    for start in range(0, file.size, CHUNK):
        digest.update(file.array(BYTE, start, min(CHUNK, file.size - start)).data)
    return digest.digest()


def hash_sample(file: TokenBytes) -> bytes:
    """Digest of a file's size and of blocks spread evenly over it; of all of it, if it is small."""
    last = max(0, file.size - SAMPLE)
    count = min(SAMPLES, -(-file.size // SAMPLE))
    offsets = [last * i // max(1, count - 1) for i in range(count)]
    return hash_parts([file.size.to_bytes(8, "little"), *file.blocks(offsets, SAMPLE)])
