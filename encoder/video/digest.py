"""Cache keys: content hashes of files and pixels, and what the file system says of a file.

Different content never shares a digest.

A file is hashed whole, from the descriptor that is decoded, each time (BLAKE2b, some 850 MiB/s on one core
beside the decoding); nothing is cached that could be stale. Only of the caller's own files over WHOLE_BYTES
samples and the state in the file system are hashed instead, since 4 GiB would take five seconds; a copy of
such a file has another digest.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from concurrent.futures import Future

from torch import Tensor

from encoder.errors import VideoError

WHOLE_BYTES = 64 * 2**20  # the caller's own files up to this size are hashed whole, a stranger's always
BLOCKS, BLOCK_BYTES = 256, 2**16  # of larger ones: this many evenly spaced blocks
AT_ONCE = 2**20  # bytes hashed per call; smaller files are not worth a thread
SETTLED_S = 2.0  # a file written less long ago may be written again within the clock's step, unnoticed


def file_state(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What the file system says of a regular file: as long as it is the same, so is the content.

    None where nothing can be concluded: no regular file, or one that was changed within SETTLED_S.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode) or time.time() - status.st_ctime <= SETTLED_S:
        return None
    return _state(status)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_digest(
    file: str | os.PathLike[str] | int, *, whole: bool = True, stop: threading.Event | None = None
) -> str:
    """BLAKE2b of a file, 32 hex digits. file: a path, or an open descriptor whose position stays as it is.

    whole: all of its content, whatever its size. Else files over WHOLE_BYTES count as the same only when
    device, inode, size, times and samples agree. stop: gives up when set.
    Raises OSError, and VideoError when the file shrinks meanwhile or `stop` is set.
    """
    if not isinstance(file, int):
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            return file_digest(descriptor, whole=whole, stop=stop)
        finally:
            os.close(descriptor)
    status = os.fstat(file)
    if not whole and status.st_size > WHOLE_BYTES:
        return _sampled(file, status)
    digest = hashlib.blake2b(digest_size=16, person=b"file")
    position = 0
    while block := _read(file, position, AT_ONCE):
        if stop is not None and stop.is_set():
            raise VideoError("The file was not hashed to its end because its reading was given up.")
        digest.update(block)
        position += len(block)
    if position < status.st_size:
        raise VideoError("The file became shorter while it was read; try again when it is complete.")
    return digest.hexdigest()


def _sampled(file: int, status: os.stat_result) -> str:
    size = status.st_size
    digest = hashlib.blake2b(repr(_state(status)).encode(), digest_size=16, person=b"samples")
    for i in range(BLOCKS):
        digest.update(_read(file, i * (size - BLOCK_BYTES) // (BLOCKS - 1), BLOCK_BYTES))
    return digest.hexdigest()


def _read(file: int, position: int, count: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, count, position)
    os.lseek(file, position, os.SEEK_SET)
    return os.read(file, count)


class Hashing:
    """`file_digest` of an open descriptor in the background of a `with` block, given up with the block."""

    def __init__(self, file: int, *, whole: bool) -> None:
        self._file, self._whole = file, whole
        self._stop = threading.Event()
        self._future: Future[str] = Future()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Hashing:
        if os.fstat(self._file).st_size > AT_ONCE:
            self._thread = threading.Thread(target=self._run, name="fluxchat-digest", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def result(self, until: float) -> str:
        """The digest; waits up to `until` on the monotonic clock. Raises TimeoutError and as file_digest."""
        if self._thread is None:
            self._run()
        return self._future.result(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        try:
            self._future.set_result(file_digest(self._file, whole=self._whole, stop=self._stop))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._future.set_exception(error)


def pixel_digest(frames: Tensor, times_s: tuple[float, ...], kind: str = "", duration_s: float = 0.0) -> str:
    """BLAKE2b of frames (T, H, W, 3), 32 hex digits: pixels, their type and shape, times, kind and length.

    kind: what the frames are taken for, one image or a list of them.
    """
    facts = (kind, float(duration_s), str(frames.dtype), tuple(frames.shape), tuple(map(float, times_s)))
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16, person=b"pixels")
    for frame in frames:
        digest.update(memoryview(frame.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
