"""Sources: whatever a caller gives (path, bytes, file object, pipe) becomes one open regular file.

    with open_source(source, limits, "the video") as file:   # for one read: file.descriptor
        ...
    held = hold(sys.stdin.buffer, limits)                     # for several reads of a one-pass source
    read_clip(held.source)

A regular file is read in place; bytes and one-pass sources (file objects, pipes, sockets, /dev/stdin) are
copied once into a nameless temporary file, which goes when its last user does.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import socket
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

from encoder.errors import VideoError
from encoder.video.descriptors import PASSES_DESCRIPTORS
from encoder.video.limits import Limits

BLOCK = 1 << 20
SLOW_FACTOR = 15  # a source that keeps sending may take this many times limits.seconds in all
DESCRIPTORS = "/proc/self/fd"
_CHECK_WRITER = "check what should write to it"
_OWN_DESCRIPTOR = re.compile(r"/(?:proc/(?:self|thread-self|(\d+))|dev)/fd/(\d+)")
_READ_ONLY = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class OpenFile:
    """A regular file, opened for reading: what is checked is what is hashed and decoded.

    name: its name, for the suffix; where descriptors cannot travel to a child (Windows), its path.
    copied: it is a copy that nobody else can write to.
    """

    descriptor: int
    name: str
    copied: bool = False


@contextmanager
def open_source(source: Any, limits: Limits, label: str) -> Iterator[OpenFile]:
    """A source as an open regular file of at least one byte and at most `limits.max_bytes`.

    A path is opened without waiting for anybody: a pipe or device is refused. Of a file object everything
    from its position on is read (as `hold` does); one that is a regular file at its start stays where it is.
    label: what errors call it. Raises VideoError.
    """
    if isinstance(source, Held) and source.file is None:
        source = source.original
    with ExitStack() as opened:
        # What is held for this read alone ends with it, also while the error that ended it is kept.
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = opened.enter_context(closing(_copy_of_bytes(source, limits, label)))
        elif _is_file_object(source):
            source = opened.enter_context(closing(hold(source, limits, label)))
        if isinstance(source, Held):
            name = source.name if PASSES_DESCRIPTORS else str(source.source)
            descriptor, copied = source.open(label), source.copied
        elif isinstance(source, (str, os.PathLike)):
            name = os.path.abspath(os.fsdecode(source))
            descriptor, copied = _open_path(name, label), False
        else:
            raise VideoError(
                f"A video cannot be a {type(source).__name__}; give a path, bytes, file or images."
            )
        opened.callback(os.close, descriptor)
        _check_file(descriptor, limits, label)
        yield OpenFile(descriptor, name, copied)


def _open_path(path: str, label: str) -> int:
    """A descriptor for reading a path; opening a pipe does not wait for its writer."""
    flags = _READ_ONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise VideoError(f"Cannot read {label}: there is no such file; check the path.") from error
        if os.path.isdir(path):
            raise VideoError(_DIRECTORY.format(label)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENXIO):
            raise VideoError(_UNREADABLE.format(label)) from error
        raise VideoError(f"Cannot read {label}: {reason(error)}; try again.") from error
    except ValueError as error:  # a zero byte in the name
        raise VideoError(f"Cannot read {label}: there is no such file; check the path.") from error


_DIRECTORY = (
    "Cannot read {}: it is a directory; give one video or image file (`fluxchat map` asks about all in one)."
)
_UNREADABLE = "Cannot read {}: it is not a readable file; check its kind and permissions."


def _check_file(descriptor: int, limits: Limits, label: str) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(_DIRECTORY.format(label))
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(_UNREADABLE.format(label))
    if status.st_size == 0:
        raise VideoError(f"Cannot read {label}: it is empty (0 bytes); export or download it again.")
    if status.st_size > limits.max_bytes:
        raise VideoError(
            f"Cannot read {label}: {status.st_size} bytes exceed the limit of {limits.max_bytes}; "
            "cut or compress it."
        )


def reason(error: OSError) -> str:
    """An operating system's error in a few words."""
    return (error.strerror or type(error).__name__).lower()


def source_name(source: Any) -> str:
    """Base name of a path or of an open file; empty for what has none."""
    if isinstance(source, Held):
        return source.name or source_name(source.original)
    value = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    if not isinstance(value, (str, os.PathLike)):
        return ""
    path = os.fsdecode(value)
    return os.path.basename(path.rstrip(os.sep)) or path


def source_label(source: Any) -> str:
    """What errors call a source for which the caller has no name: its own in quotes, or "the video"."""
    name = source_name(source)
    return repr(name) if name else "the video"


# -- holding a source that can be read only once -------------------------------------------------------------


class Held:
    """A source that can be read again and again while this object lives.

    original: what was given, where that can be read again itself. file: else the open file to read instead.
    name: what errors call it, without quotes; empty when it has none. copied: `file` is a copy.
    """

    def __init__(
        self, original: Any, name: str = "", file: BinaryIO | None = None, copied: bool = False
    ) -> None:
        self.original, self.name, self.file, self.copied = original, name, file, copied
        self._end = weakref.finalize(self, _discard, file, os.getpid()) if file is not None else None

    @property
    def source(self) -> Any:
        """What `probe` and `read_clip` take: the original, the path of the file, or this object."""
        if self.file is None:
            return self.original
        if isinstance(self.file.name, str):
            return self.file.name
        # Not "self": the path must mean the same in a child process.
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if os.path.isdir(DESCRIPTORS) else self

    def open(self, label: str) -> int:
        """A new descriptor of the file that cannot write and, on Linux, has a position of its own.

        Raises VideoError.
        """
        file = self.file
        assert file is not None
        named = isinstance(file.name, str)
        try:
            return os.open(file.name if named else f"{DESCRIPTORS}/{file.fileno()}", _READ_ONLY)
        except OSError as error:
            if not named and _is_read_only(file.fileno()):
                return os.dup(file.fileno())
            raise VideoError(
                f"Cannot read {label}: open it for reading only, in binary mode ('rb')."
            ) from error

    def close(self) -> None:
        """Free the file now instead of with the last reference; a second time does nothing."""
        if self._end is not None:
            self._end()


def _is_read_only(descriptor: int) -> bool:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def _discard(file: BinaryIO, owner: int) -> None:
    """Close a file that was held; where it has a name, the process that made it deletes it."""
    file.close()
    if isinstance(file.name, str) and os.getpid() == owner:
        os.unlink(file.name)


def hold(source: Any, limits: Limits, label: str | None = None) -> Held:
    """A source as one that can be read again.

    What can be read again already (paths of files, bytes, images, clips) passes unchanged, and so does what
    is no source at all; the reader says so. limits: `max_bytes` of a copy; nothing may come for `seconds`,
    and the whole may take SLOW_FACTOR times as long. label: what errors call it. Raises VideoError.
    """
    if isinstance(source, Held):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _hold_path(source, limits, label)
    if _is_file_object(source):
        return _hold_file_object(source, limits, label)
    return Held(source)


def _hold_path(source: str | os.PathLike[str], limits: Limits, label: str | None) -> Held:
    path = os.path.abspath(os.fsdecode(source))
    name = os.path.basename(path)
    label = label or repr(name)
    own = _own_descriptor(path)
    try:
        status = os.stat(path) if own is None else os.fstat(own)
    except (OSError, ValueError):  # the reader says what is wrong with it
        return Held(source)
    if own is None:
        if stat.S_ISFIFO(status.st_mode):
            return _copy_of(lambda: _open_fifo(path), limits, name, label, _CHECK_WRITER)
        return Held(source)
    if os.isatty(own):
        raise VideoError(f"Cannot read {label}: it is a terminal; pipe a video into it, or name a file.")
    # The same number may mean another file in a decoding child: only this process can open it.
    file = os.fdopen(os.dup(own), "rb", buffering=0)
    if stat.S_ISREG(status.st_mode) and PASSES_DESCRIPTORS:
        return Held(None, name, file)
    return _copy_of(lambda: file, limits, name, label, _CHECK_WRITER)


def _open_fifo(path: str) -> BinaryIO:
    """A FIFO for reading. Where polling waits for the first writer, opening does not: whoever gave up after a
    while must not take what the next one is sent."""
    flags = os.O_NONBLOCK if sys.platform == "linux" else 0
    return os.fdopen(os.open(path, _READ_ONLY | flags), "rb", buffering=0)


def _own_descriptor(path: str) -> int | None:
    """The number of this process's descriptor that a path stands for."""
    if path == "/dev/stdin":
        return 0
    match = _OWN_DESCRIPTOR.fullmatch(path)
    if match is None or match[1] not in (None, str(os.getpid())):
        return None
    return int(match[2])


def _is_file_object(source: Any) -> bool:
    return callable(getattr(source, "read", None)) and not isinstance(source, type)


def _hold_file_object(source: Any, limits: Limits, label: str | None) -> Held:
    label = label or source_label(source)
    if isinstance(source, io.TextIOBase):
        raise VideoError(f"Cannot read {label}: it is open as text; open it in binary mode ('rb').")
    name = source_name(source)
    if (descriptor := _whole_file(source)) is not None:
        return Held(None, name, os.fdopen(os.dup(descriptor), "rb", buffering=0))
    return _copy_of(
        lambda: nullcontext(source), limits, name, label, "give one that stands at its start (seek(0))"
    )


def _whole_file(source: Any) -> int | None:
    """Descriptor of a file object that stands at the beginning of a regular file; None for any other.

    Only Python's own files are believed: a decompressing reader has the descriptor of what it decompresses.
    """
    if not PASSES_DESCRIPTORS:
        return None
    raw: Any = source.file if isinstance(source, tempfile._TemporaryFileWrapper) else source
    if type(raw) in (io.BufferedReader, io.BufferedRandom):
        raw = raw.raw
    if type(raw) is not io.FileIO:
        return None
    try:
        if not source.readable() or source.tell() != 0:
            return None
        source.flush()  # what was written to it and is still in its buffer
        descriptor = raw.fileno()
        return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except (OSError, ValueError):  # closed: copying it says so
        return None


# -- copies --------------------------------------------------------------------------------------------------


def _temporary(name: str) -> tuple[Held, BinaryIO]:
    """An empty temporary file; with a name only where no other way leads to it, and deleted with its Held."""
    if PASSES_DESCRIPTORS and os.path.isdir(DESCRIPTORS):
        file: BinaryIO = tempfile.TemporaryFile(prefix="fluxchat-")  # noqa: SIM115 - the Held closes it
    else:
        handle, path = tempfile.mkstemp(prefix="fluxchat-")
        os.close(handle)
        file = open(path, "w+b")  # noqa: SIM115
    return Held(None, name, file, copied=True), file


def _copy_of_bytes(source: bytes | bytearray | memoryview, limits: Limits, label: str) -> Held:
    """The content of a buffer, at most one byte over the limit, in a temporary file."""
    held, file = _temporary("")
    view = memoryview(source)
    content = view.cast("B") if view.c_contiguous else memoryview(bytes(view))
    try:
        file.write(content[: limits.max_bytes + 1])
        file.flush()
    except OSError as error:
        held.close()
        raise VideoError(f"Cannot read {label}: {_no_room(error)}.") from error
    return held


def _no_room(error: OSError) -> str:
    return f"no copy of it can be kept ({error.strerror or error}); make room in {tempfile.gettempdir()}"


def _copy_of(
    open_source: Callable[[], AbstractContextManager[Any]],
    limits: Limits,
    name: str,
    label: str,
    if_empty: str,
) -> Held:
    """A one-pass source's bytes in a temporary file. if_empty: what to do when there are none."""
    held, file = _temporary(name)
    copy = _Copy(open_source, file, limits.max_bytes + 1)
    copy.start()
    try:
        problem = copy.wait(limits)
    finally:
        copy.abandoned = True
        copy.join(0.2)  # so that nothing of a source that can be waited for is in use any more
    if problem is None and copy.bytes > limits.max_bytes:
        problem = f"it has more than the {limits.max_bytes} bytes allowed; cut or compress it"
    if problem is None and copy.bytes == 0:
        problem = f"it gives 0 bytes; {if_empty}"
    if problem is not None:
        held.close()
        raise VideoError(f"Cannot read {label}: {problem}.") from copy.error
    return held


class _Copy(threading.Thread):
    """Copies in a thread of its own: there is no other way to stop waiting for a source that blocks."""

    def __init__(
        self, open_source: Callable[[], AbstractContextManager[Any]], file: BinaryIO, max_bytes: int
    ) -> None:
        super().__init__(name="fluxchat-source", daemon=True)
        self._open, self._file, self._max_bytes = open_source, file, max_bytes
        self.bytes = 0
        self.error: BaseException | None = None
        self.abandoned = False  # nobody waits any more
        self._problem: str | None = None
        self._moved = self._began = time.monotonic()
        self._done = threading.Event()

    def run(self) -> None:
        """Copy until the end of the source, the most bytes, an error, or until nobody waits."""
        try:
            with self._open() as source:
                self._problem = self._copy(source)
        except BaseException as error:  # noqa: BLE001 - whatever a source raises is one sentence
            self.error = error
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            self._problem = f"reading it failed ({type(error).__name__}: {first_line}); open it again"
        self._done.set()

    def _copy(self, source: Any) -> str | None:
        # What is there at once, rather than a whole block: a slow source is not a silent one.
        read = getattr(source, "read1", None) or source.read
        poll = _poll(source)
        while self.bytes < self._max_bytes and not self.abandoned:
            if poll is not None and not poll.poll(50):
                continue
            block = read(min(BLOCK, self._max_bytes - self.bytes))
            if block is None:  # nothing yet, of a source that does not block
                time.sleep(0.01)
                continue
            if isinstance(block, str):
                return "it gives text; open it in binary mode ('rb')"
            if not isinstance(block, (bytes, bytearray, memoryview)):
                return f"its read() gives a {type(block).__name__}, not bytes; give a binary file object"
            if not len(block) or self.abandoned:
                break
            try:
                self._file.write(block)
            except OSError as error:
                return _no_room(error)
            self.bytes += len(block)
            self._moved = time.monotonic()
        try:
            self._file.flush()
        except OSError as error:
            return _no_room(error)
        return None

    def wait(self, limits: Limits) -> str | None:
        """Until it is done; what went wrong, as the end of a sentence."""
        while True:
            now = time.monotonic()
            idle = self._moved + limits.seconds - now
            rest = self._began + SLOW_FACTOR * limits.seconds - now
            if self._done.wait(max(0.0, min(idle, rest))):
                return self._problem
            if self._moved + limits.seconds <= time.monotonic():
                return f"nothing came from it for {limits.seconds:g} s; {_CHECK_WRITER}"
            if rest <= 0:
                return f"it did not end within {SLOW_FACTOR * limits.seconds:g} s; save it to a file first"


def _poll(source: Any) -> select.poll | None:
    """What tells whether a pipe or socket has something to read; None for what may have it in a buffer.

    A thread that waits inside a file object keeps whoever closes it waiting, too.
    """
    raw = source.raw if type(source) in (io.BufferedReader, io.BufferedRandom) else source
    plain = type(raw) is io.FileIO
    if isinstance(raw, socket.SocketIO):
        plain = type(getattr(raw, "_sock", None)) is socket.socket  # one with TLS has a buffer of its own
    if not plain or not hasattr(select, "poll"):
        return None
    poll = select.poll()
    poll.register(raw.fileno(), select.POLLIN)
    return poll


# -- sources of one caller -----------------------------------------------------------------------------------


class HeldSources:
    """What is held of file objects and own descriptors that were asked about: the same ones are read once.

    Kept while the file object lives, of descriptors until `close`. Safe to use from many threads.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._by_object: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()
        self._by_key: dict[Any, _Entry] = {}

    def hold(self, source: Any, label: str | None = None) -> Held:
        """As `hold`; a file object is read again only when it was moved since. Raises VideoError."""
        entry = self._entry(source)
        if entry is None:
            return hold(source, self._limits, label)
        with entry.lock:
            position = _position(source)
            if entry.held is None or (position is not None and position != entry.position):
                entry.held = hold(source, self._limits, label)
                entry.position = _position(source)
            return entry.held

    def close(self) -> None:
        """Let go of all; what is still used stays as long as it is."""
        with self._lock:
            self._by_object.clear()
            self._by_key.clear()

    def _entry(self, source: Any) -> _Entry | None:
        """Where the source is kept; None for one that can be read again, or means another one each time."""
        if isinstance(source, (str, os.PathLike)):
            number = _own_descriptor(os.path.abspath(os.fsdecode(source)))
            if number is None:
                return None
            try:
                status = os.fstat(number)
            except OSError:
                return None
            with self._lock:
                return self._by_key.setdefault((status.st_dev, status.st_ino), _Entry())
        if isinstance(source, Held) or not _is_file_object(source):
            return None
        with self._lock:
            try:
                return self._by_object.setdefault(source, _Entry())
            except TypeError:  # neither weakly nor by hash: kept until the end, itself too
                return self._by_key.setdefault(id(source), _Entry(source))


class _Entry:
    """What is held of one source. position: where the source stood after reading."""

    def __init__(self, source: Any = None) -> None:
        self.source = source
        self.lock = threading.Lock()
        self.held: Held | None = None
        self.position: int | None = None


def _position(source: Any) -> int | None:
    """Position of a file object; None where it has none, or is closed."""
    try:
        return int(source.tell())
    except Exception:  # noqa: BLE001 - whatever a source raises, it tells nothing
        return None
