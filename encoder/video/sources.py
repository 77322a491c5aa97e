"""Sources that can be read only once (file objects, pipes, sockets, /dev/stdin), made readable again.

    held = hold(sys.stdin.buffer, limits)
    read_clip(held.source)

They are copied once into a nameless temporary file, which goes when the last user of the `Held` does. A file
object on a whole file of its own is read in place, through its descriptor.
"""

from __future__ import annotations

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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from encoder.errors import VideoError

if TYPE_CHECKING:
    from encoder.video.reader import Limits

BLOCK = 1 << 20
PATIENCE = 15  # a source may take so many times the limit in seconds in all, as long as it goes on
_DESCRIPTORS = "/proc/self/fd"
_PIPE = "check what should write to it"
_OWN_DESCRIPTOR = re.compile(r"/(?:proc/(?:self|thread-self|(\d+))|dev)/fd/(\d+)")


class Held:
    """A source that can be read again and again while this object lives.

    name: what errors call it, without quotes; empty when it has none.
    """

    def __init__(self, source: Any, name: str = "", file: BinaryIO | None = None) -> None:
        self.name = name
        self._source, self._file = source, file
        self._end = weakref.finalize(self, _discard, file, os.getpid()) if file is not None else None

    @property
    def source(self) -> Any:
        """What `probe` and `read_clip` take: the source itself, or the path of what was kept of it."""
        if self._file is None:
            return self._source
        if not os.path.isdir(_DESCRIPTORS):
            return self._file.name
        # Not "self": the path must mean the same in a child process.
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def close(self) -> None:
        """Free what is kept now instead of with the last reference; a second time does nothing."""
        if self._end is not None:
            self._end()


def _discard(file: BinaryIO, owner: int) -> None:
    """Close a kept file; where it has a name, the process that made it deletes it."""
    file.close()
    if isinstance(file.name, str) and os.getpid() == owner:
        os.unlink(file.name)


def hold(source: Any, limits: Limits, label: str | None = None) -> Held:
    """A source as one that can be read again.

    What can be read again already (paths of files, bytes, images, clips) passes unchanged, and so does what
    is no source at all; the reader says so. limits: `max_bytes` of a copy; nothing may come for `seconds`,
    and the whole may take PATIENCE times as long. label: what errors call it. Raises VideoError.
    """
    if isinstance(source, Held):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _hold_path(source, limits, label)
    if callable(getattr(source, "read", None)) and not isinstance(source, type):
        return _hold_file(source, limits, label)
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
            return _copied(lambda: _open_fifo(path), limits, name, label, _PIPE)
        return Held(source)
    if os.isatty(own):
        raise VideoError(f"Cannot read {label}: it is a terminal; pipe a video into it, or name a file.")
    # The same number may mean another file in a decoding child: only this process can open it.
    file = os.fdopen(os.dup(own), "rb", buffering=0)
    if stat.S_ISREG(status.st_mode) and os.path.isdir(_DESCRIPTORS):
        return Held(None, name, file)
    return _copied(lambda: file, limits, name, label, _PIPE)


def _open_fifo(path: str) -> BinaryIO:
    """A FIFO for reading. Where polling waits for the first writer, opening does not: whoever gave up after a
    while must not take what the next one is sent."""
    flags = os.O_NONBLOCK if sys.platform == "linux" else 0
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), "rb", buffering=0)


def _own_descriptor(path: str) -> int | None:
    """The number of this process's descriptor that a path stands for."""
    if path == "/dev/stdin":
        return 0
    found = _OWN_DESCRIPTOR.fullmatch(path)
    if found is None or found[1] not in (None, str(os.getpid())):
        return None
    return int(found[2])


def _hold_file(source: Any, limits: Limits, label: str | None) -> Held:
    name = source_name(source)
    label = label or (repr(name) if name else "the video")
    if isinstance(source, io.TextIOBase):
        raise VideoError(f"Cannot read {label}: it is open as text; open it in binary mode ('rb').")
    if (descriptor := _whole_file(source)) is not None:
        return Held(None, name, os.fdopen(os.dup(descriptor), "rb", buffering=0))
    return _copied(lambda: source, limits, name, label, "give one that stands at its start (seek(0))")


def source_name(source: Any) -> str:
    """Base name of a path or of an open file; empty for what has none."""
    if isinstance(source, Held):
        return source.name or source_name(source._source)
    value = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    if not isinstance(value, (str, os.PathLike)):
        return ""
    path = os.fsdecode(value)
    return os.path.basename(path.rstrip(os.sep)) or path


def _whole_file(source: Any) -> int | None:
    """Descriptor of a file object that stands at the beginning of a regular file; None for any other.

    Only Python's own files are believed: a decompressing reader has the descriptor of what it decompresses.
    """
    if not os.path.isdir(_DESCRIPTORS):
        return None
    raw: Any = source.file if isinstance(source, tempfile._TemporaryFileWrapper) else source
    if type(raw) in (io.BufferedReader, io.BufferedRandom):
        raw = raw.raw
    if type(raw) is not io.FileIO:
        return None
    try:
        if not source.readable() or source.tell() != 0:
            return None
        descriptor = raw.fileno()
        return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except (OSError, ValueError):  # closed: copying it says so
        return None


def _copied(open_source: Callable[[], Any], limits: Limits, name: str, label: str, cure: str) -> Held:
    """A one-pass source's bytes in a temporary file. cure: what to do when there are none."""
    if os.path.isdir(_DESCRIPTORS):
        file: BinaryIO = tempfile.TemporaryFile(prefix="fluxchat-")  # noqa: SIM115 - the Held closes it
    else:
        file = tempfile.NamedTemporaryFile(prefix="fluxchat-", delete=False).file  # type: ignore[assignment] # noqa: SIM115
    held = Held(None, name, file)
    copy = _Copy(open_source, file, limits.max_bytes + 1)
    copy.start()
    try:
        problem = copy.wait(limits)
    finally:
        copy.left = True
        copy.join(0.2)  # so that nothing of a source that can be waited for is in use any more
    if problem is None and copy.bytes > limits.max_bytes:
        problem = f"it has more than the {limits.max_bytes} bytes allowed; cut or compress it"
    if problem is None and copy.bytes == 0:
        problem = f"it gives 0 bytes; {cure}"
    if problem is not None:
        raise VideoError(f"Cannot read {label}: {problem}.") from copy.error
    file.flush()
    return held


class _Copy(threading.Thread):
    """Copies in a thread of its own: no way but this ends the wait for a source that blocks."""

    def __init__(self, open_source: Callable[[], Any], file: BinaryIO, most: int) -> None:
        super().__init__(name="fluxchat-source", daemon=True)
        self._open, self._file, self._most = open_source, file, most
        self.bytes = 0
        self.error: BaseException | None = None
        self.left = False  # nobody waits any more
        self._problem: str | None = None
        self._moved = self._began = time.monotonic()
        self._done = threading.Event()

    def run(self) -> None:
        """Copy until the end of the source, the most bytes, an error, or until nobody waits."""
        try:
            self._problem = self._copy()
        except BaseException as error:  # noqa: BLE001 - whatever a source raises is one sentence
            self.error = error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            self._problem = f"reading it failed ({type(error).__name__}: {reason}); open it again"
        self._done.set()

    def _copy(self) -> str | None:
        source = self._open()
        # What is there at once, rather than a whole block: a slow source is not a silent one.
        read = getattr(source, "read1", None) or source.read
        waited_for = _awaitable(source)
        while self.bytes < self._most and not self.left:
            if waited_for is not None and not waited_for.poll(50):
                continue
            block = read(min(BLOCK, self._most - self.bytes))
            if block is None:  # nothing yet, of a source that does not block
                time.sleep(0.01)
                continue
            if isinstance(block, str):
                return "it gives text; open it in binary mode ('rb')"
            if not isinstance(block, (bytes, bytearray, memoryview)):
                return f"its read() gives a {type(block).__name__}, not bytes; give a binary file object"
            if not len(block) or self.left:
                break
            try:
                self._file.write(block)
            except OSError as error:
                reason = error.strerror or error
                return f"no copy of it can be kept ({reason}); make room in {tempfile.gettempdir()}"
            self.bytes += len(block)
            self._moved = time.monotonic()
        return None

    def wait(self, limits: Limits) -> str | None:
        """Until it is done; what went wrong, as the end of a sentence."""
        while True:
            now = time.monotonic()
            idle, rest = self._moved + limits.seconds - now, self._began + PATIENCE * limits.seconds - now
            if self._done.wait(max(0.0, min(idle, rest))):
                return self._problem
            if self._moved + limits.seconds <= time.monotonic():
                return f"nothing came from it for {limits.seconds:g} s; {_PIPE}"
            if rest <= 0:
                return f"it did not end within {PATIENCE * limits.seconds:g} s; save it to a file first"


def _awaitable(source: Any) -> select.poll | None:
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
            place = _place(source)
            if entry.held is None or (place is not None and place != entry.place):
                entry.held = hold(source, self._limits, label)
                entry.place = _place(source)
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
        if isinstance(source, (type, Held)) or not callable(getattr(source, "read", None)):
            return None
        with self._lock:
            try:
                return self._by_object.setdefault(source, _Entry())
            except TypeError:  # neither weakly nor by hash: kept until the end, itself too
                return self._by_key.setdefault(id(source), _Entry(source))


class _Entry:
    """What is held of one source. place: where it stood after reading."""

    def __init__(self, source: Any = None) -> None:
        self.source = source
        self.lock = threading.Lock()
        self.held: Held | None = None
        self.place: int | None = None


def _place(source: Any) -> int | None:
    """Position of a file object; None where it has none, or is closed."""
    try:
        return int(source.tell())
    except Exception:  # noqa: BLE001 - whatever a source raises, it tells nothing
        return None
