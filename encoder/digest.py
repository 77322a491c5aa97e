"""Content hashes that key caches: the same bytes or pixels give the same hex string."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache

from torch import Tensor

WHOLE_BYTES = 64 * 2**20  # files up to this size are hashed whole
BLOCKS, BLOCK_BYTES = 256, 2**16  # of larger ones: the size and this many evenly spaced blocks


def file_digest(path: str | os.PathLike[str]) -> str:
    """BLAKE2b of a file's content (32 hex digits). Raises OSError."""
    path = os.path.abspath(path)
    stat = os.stat(path)
    return _file_digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, mtime_ns: int, inode: int) -> str:
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def pixel_digest(frames: Tensor, times_s: tuple[float, ...]) -> str:
    """BLAKE2b of uint8 frames (T, H, W, 3), their shape and times (32 hex digits)."""
    digest = hashlib.blake2b(repr((tuple(frames.shape), times_s)).encode(), digest_size=16)
    for frame in frames:
        digest.update(memoryview(frame.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
