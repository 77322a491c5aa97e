"""Sources that can be read only once: what is held of them can be read again, and nothing of it stays."""

from __future__ import annotations

import gc
import gzip
import io
import os
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import VideoError
from encoder.video.reader import DEFAULT_LIMITS, Limits, probe, read_clip
from encoder.video.sources import Held, HeldSources, hold
from tests.encoder.video import video_files as vf

SHORT = Limits(seconds=0.2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vf.write(tmp_path_factory.mktemp("sources") / "clip.mp4", vf.steady(12))


def fed(descriptor: int, content: bytes) -> threading.Thread:
    """Writes to a descriptor and closes it, in a thread."""

    def write() -> None:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Trickle(io.RawIOBase):
    """A raw stream that gives at most 1000 bytes at a time, and sometimes nothing yet."""

    def __init__(self, content: bytes) -> None:
        self._content, self._turn = io.BytesIO(content), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._turn += 1
        if self._turn % 4 == 0:
            return None
        block = self._content.read(min(1000, len(buffer)))
        buffer[: len(block)] = block
        return len(block)


class OnlyRead:
    """Has `read` and nothing else, not even a place for weak references."""

    __slots__ = ("_content",)

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int) -> bytes:
        return self._content.read(size)


def pipe(path: Path, stack: ExitStack) -> Any:
    reading, writing = os.pipe()
    stack.callback(fed(writing, path.read_bytes()).join)
    return stack.enter_context(os.fdopen(reading, "rb"))


def socket_file(path: Path, stack: ExitStack) -> Any:
    ours, theirs = socket.socketpair()
    stack.callback(fed(theirs.detach(), path.read_bytes()).join)
    stack.callback(ours.close)
    return stack.enter_context(ours.makefile("rb"))


def fifo(path: Path, stack: ExitStack) -> Any:
    name = path.parent / f"fifo{id(stack)}"
    os.mkfifo(name)
    thread = threading.Thread(target=lambda: name.write_bytes(path.read_bytes()))
    thread.start()
    stack.callback(thread.join)
    return name


def descriptor_path(path: Path, stack: ExitStack) -> Any:
    return f"/proc/self/fd/{pipe(path, stack).fileno()}"


def file_descriptor_path(path: Path, stack: ExitStack) -> Any:
    return f"/dev/fd/{stack.enter_context(path.open('rb')).fileno()}"


def spooled(path: Path, stack: ExitStack) -> Any:
    file = stack.enter_context(tempfile.SpooledTemporaryFile(1000))  # noqa: SIM115
    file.write(path.read_bytes())
    file.seek(0)
    return file


def temporary(path: Path, stack: ExitStack) -> Any:
    file = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115
    file.write(path.read_bytes())
    file.seek(0)
    return file


def zip_member(path: Path, stack: ExitStack) -> Any:
    archive = path.parent / f"{id(stack)}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, "inner.mp4")
    return stack.enter_context(stack.enter_context(zipfile.ZipFile(archive)).open("inner.mp4"))


def decompressed(path: Path, stack: ExitStack) -> Any:
    packed = path.parent / f"{id(stack)}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return stack.enter_context(gzip.open(packed))


KINDS: dict[str, Callable[[Path, ExitStack], Any]] = {
    "bytes in memory": lambda path, stack: io.BytesIO(path.read_bytes()),
    "open file": lambda path, stack: stack.enter_context(path.open("rb")),
    "raw file": lambda path, stack: stack.enter_context(path.open("rb", buffering=0)),
    "read and write": lambda path, stack: stack.enter_context(path.open("r+b")),
    "spooled": spooled,
    "temporary": temporary,
    "pipe": pipe,
    "socket": socket_file,
    "fifo": fifo,
    "descriptor of a pipe": descriptor_path,
    "descriptor of a file": file_descriptor_path,
    "zip member": zip_member,
    "decompressed": decompressed,
    "trickle": lambda path, stack: Trickle(path.read_bytes()),
    "only read": lambda path, stack: OnlyRead(path.read_bytes()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_can_be_read_again(video: Path, kind: str) -> None:
    with ExitStack() as stack:
        held = hold(KINDS[kind](video, stack), DEFAULT_LIMITS)
        stack.close()  # the source itself is gone
        for _ in range(2):
            assert Path(held.source).read_bytes() == video.read_bytes()
    assert probe(held.source).digest == probe(video).digest
    assert len(read_clip(held.source, 3).frames) == 3


@pytest.mark.parametrize("kind", ["bytes in memory", "fifo", "open file", "descriptor of a file"])
def test_nothing_stays_when_the_last_user_is_gone(video: Path, kind: str) -> None:
    files = set(os.listdir(tempfile.gettempdir()))
    before = descriptors()
    with ExitStack() as stack:
        held = hold(KINDS[kind](video, stack), DEFAULT_LIMITS)
    assert descriptors() == before + 1
    del held
    assert descriptors() == before
    new = set(os.listdir(tempfile.gettempdir())) - files
    assert not [name for name in new if name.startswith("fluxchat-") and os.path.isfile(name)]


def test_a_whole_file_is_read_in_place(video: Path) -> None:
    with video.open("rb") as file:
        held = hold(file, DEFAULT_LIMITS)
        assert os.path.samefile(held.source, video)
        assert file.tell() == 0
        file.seek(5)
        rest = hold(file, DEFAULT_LIMITS)
        assert Path(rest.source).read_bytes() == video.read_bytes()[5:]
    held.close()
    held.close()


def test_what_can_be_read_again_passes_unchanged(video: Path) -> None:
    clip = read_clip(video, 2)
    for source in (str(video), video, b"bytes", clip, [clip], None, 5, "missing.mp4", io.BytesIO):
        assert hold(source, DEFAULT_LIMITS).source is source
    held = Held(video)
    assert hold(held, DEFAULT_LIMITS) is held


class Failing:
    def read(self, size: int) -> bytes:
        raise RuntimeError("the cable was pulled")


class Strange:
    def read(self, size: int) -> Any:
        return 7


class Endless:
    def read(self, size: int) -> bytes:
        return bytes(size)


def closed_file(stack: ExitStack) -> Any:
    file = io.BytesIO(b"x")
    file.close()
    return file


def silent_pipe(stack: ExitStack) -> Any:
    reading, writing = os.pipe()
    stack.callback(os.close, writing)
    return stack.enter_context(os.fdopen(reading, "rb"))


def silent_fifo(stack: ExitStack) -> Any:
    name = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fifo"
    os.mkfifo(name)
    stack.callback(lambda: os.close(os.open(name, os.O_RDWR | os.O_NONBLOCK)))  # lets the reader go
    return name


class Dripping:
    """Never silent for long, never at its end."""

    def __init__(self, gone: threading.Event) -> None:
        self._gone = gone

    def read(self, size: int) -> bytes:
        return b"" if self._gone.wait(0.01) else b"x"


def dripping(stack: ExitStack) -> Any:
    gone = threading.Event()
    stack.callback(gone.set)
    return Dripping(gone)


WRONG: dict[str, tuple[Callable[[ExitStack], Any], str]] = {
    "text": (lambda stack: io.StringIO("a"), "open as text.*'rb'"),
    "raises": (lambda stack: Failing(), "RuntimeError: the cable was pulled"),
    "gives a number": (lambda stack: Strange(), "gives a int, not bytes"),
    "endless": (lambda stack: Endless(), "more than the 100000 bytes"),
    "closed": (closed_file, "closed file"),
    "at its end": (lambda stack: io.BytesIO(), r"0 bytes.*seek\(0\)"),
    "silent pipe": (silent_pipe, "nothing came from it for 0.2 s"),
    "silent fifo": (silent_fifo, "nothing came from it for 0.2 s"),
    "dripping": (dripping, "did not end within 0.4 s"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_source_that_gives_no_video_ends_in_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encoder.video.sources.PATIENCE", 2)
    make, words = WRONG[kind]
    with ExitStack() as stack, pytest.raises(VideoError, match=words) as caught:
        hold(make(stack), Limits(seconds=0.2, max_bytes=100_000), "video 2 of 3")
    assert str(caught.value).startswith("Cannot read video 2 of 3: ")
    assert "\n" not in str(caught.value)


def test_a_writer_that_comes_too_late_loses_nothing(video: Path, tmp_path: Path) -> None:
    """Nobody who gave up waiting at a FIFO takes what the next one is sent."""
    name = tmp_path / "fifo"
    os.mkfifo(name)
    with pytest.raises(VideoError, match="nothing came from it"):
        hold(name, SHORT)
    content = video.read_bytes() * 20  # more than a pipe holds
    writer = threading.Thread(target=lambda: name.write_bytes(content))
    writer.start()
    held = hold(name, Limits(seconds=10))
    writer.join()
    assert Path(held.source).read_bytes() == content


def test_the_same_file_object_is_read_once(video: Path) -> None:
    sources = HeldSources(DEFAULT_LIMITS)
    with ExitStack() as stack:
        for kind in ("pipe", "bytes in memory", "open file", "only read", "descriptor of a pipe"):
            source = KINDS[kind](video, stack)
            assert sources.hold(source) is sources.hold(source), kind
    other = io.BytesIO(video.read_bytes())
    first = sources.hold(other)
    other.seek(0)
    other.write(b"another content")
    other.truncate()
    other.seek(0)
    assert Path(sources.hold(other).source).read_bytes() == b"another content"
    assert Path(first.source).read_bytes() == video.read_bytes()


def test_many_threads_read_one_pipe_once(video: Path) -> None:
    sources, found = HeldSources(DEFAULT_LIMITS), []
    with ExitStack() as stack:
        source = pipe(video, stack)
        threads = [threading.Thread(target=lambda: found.append(sources.hold(source))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


@pytest.fixture
def sources() -> HeldSources:
    return HeldSources(DEFAULT_LIMITS)


def test_what_is_kept_goes_with_its_file_object(video: Path, sources: HeldSources) -> None:
    before = descriptors()
    source = io.BytesIO(video.read_bytes())
    sources.hold(source)
    assert descriptors() == before + 1
    del source
    assert descriptors() == before
    kept = OnlyRead(video.read_bytes())
    sources.hold(kept)
    del kept
    assert descriptors() == before + 1
    sources.close()
    assert descriptors() == before
