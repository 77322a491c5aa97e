"""Sources: what is checked is what is read; one-pass sources can be read again and leave nothing behind."""

from __future__ import annotations

import errno
import gc
import gzip
import io
import os
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import VideoError
from encoder.video.descriptors import DescriptorReader, descriptor_name, open_file
from encoder.video.reader import DEFAULT_LIMITS, Limits, probe, read_clip
from encoder.video.replies import Decoded
from encoder.video.sandbox import WorkerPool
from encoder.video.sources import Held, HeldSources, hold
from tests.encoder.video import video_files as vf
from tests.patience import until

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


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Meanwhile nothing is freed but by its last reference, the garbage of other tests neither."""
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
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
def test_held_sources_can_be_read_again(video: Path, kind: str) -> None:
    with ExitStack() as stack:
        held = hold(KINDS[kind](video, stack), DEFAULT_LIMITS)
        stack.close()  # the source itself is gone
        for _ in range(2):
            assert Path(held.source).read_bytes() == video.read_bytes()
    assert probe(held.source).digest == probe(video).digest
    assert len(read_clip(held.source, 3).frames) == 3


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("kind", ["bytes in memory", "fifo", "open file", "descriptor of a file"])
def test_a_held_source_is_freed_with_its_last_reference(video: Path, kind: str) -> None:
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


def test_sources_that_can_be_read_again_pass_unchanged(video: Path) -> None:
    clip = read_clip(video, 2)
    for source in (str(video), video, b"bytes", clip, [clip], None, 5, "missing.mp4", io.BytesIO):
        assert hold(source, DEFAULT_LIMITS).source is source
    held = Held(video)
    assert hold(held, DEFAULT_LIMITS) is held
    for source in (video, video.read_bytes(), io.BytesIO(video.read_bytes())):
        assert probe(hold(source, DEFAULT_LIMITS)).digest == clip.info.digest


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
def test_sources_that_fail_are_one_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encoder.video.sources.SLOW_FACTOR", 2)
    make, words = WRONG[kind]
    with ExitStack() as stack, pytest.raises(VideoError, match=words) as caught:
        hold(make(stack), Limits(seconds=0.2, max_bytes=100_000), "video 2 of 3")
    assert str(caught.value).startswith("Cannot read video 2 of 3: ")
    assert "\n" not in str(caught.value)


def given_up_fifo(tmp_path: Path) -> Any:
    hold(silent_at(tmp_path / "fifo"), SHORT)


def silent_at(name: Path) -> Path:
    os.mkfifo(name)
    return name


def empty_descriptor(tmp_path: Path) -> Any:
    with open(os.devnull, "rb") as file:
        hold(f"/dev/fd/{file.fileno()}", SHORT)


FAILING: dict[str, Callable[[Path], Any]] = {
    "too many bytes": lambda tmp_path: probe(b"12345", limits=Limits(max_bytes=4)),
    "too much of a file object": lambda tmp_path: hold(io.BytesIO(b"12345"), Limits(max_bytes=4)),
    "nothing": lambda tmp_path: hold(io.BytesIO(), SHORT),
    "raises": lambda tmp_path: hold(Failing(), SHORT),
    "silent fifo": given_up_fifo,
    "empty descriptor": empty_descriptor,
}


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("kind", FAILING)
def test_what_failed_leaves_nothing_open_while_its_error_is_kept(kind: str, tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(VideoError) as kept:
        FAILING[kind](tmp_path)
    until(lambda: descriptors() == before)  # a source that was given up is closed by its own thread
    assert kept.value.__traceback__ is not None


def test_a_late_writer_of_a_fifo_loses_nothing(video: Path, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("uncollected")
def test_copies_are_freed_with_their_file_object(video: Path, sources: HeldSources) -> None:
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


@pytest.fixture
def clip(tmp_path) -> Path:
    return vf.write(tmp_path / "v.mp4", vf.steady(5))


@pytest.fixture
def other(tmp_path) -> Path:
    return vf.write(tmp_path / "other.mp4", vf.steady(50))


def around_decoding(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Run code after a file was opened and checked and before it is decoded, or after that."""
    decode = WorkerPool.decode

    def decode_between(self: WorkerPool, *arguments: Any, **options: Any) -> Decoded:
        before()
        decoded = decode(self, *arguments, **options)
        after()
        return decoded

    monkeypatch.setattr(WorkerPool, "decode", decode_between)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_path_that_changes_after_the_check_is_not_followed(clip, other, monkeypatch, trusted):
    def swap() -> None:
        clip.unlink()
        clip.symlink_to(other)

    around_decoding(monkeypatch, before=swap)
    assert probe(clip, trusted=trusted).duration_s == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("buffering", [0, -1])
def test_an_open_file_is_read_in_place_and_stays_where_it_is(clip, other, monkeypatch, mode, buffering):
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # no copy can be made
    with open(clip, mode, buffering=buffering) as file:
        os.replace(other, clip)
        for trusted in (True, False):
            assert probe(file, trusted=trusted).duration_s == pytest.approx(0.2, abs=0.01)
            assert file.tell() == 0


def test_buffered_writes_of_an_open_file_are_read(clip, tmp_path):
    with open(tmp_path / "new.mp4", "w+b") as file:
        file.write(clip.read_bytes())
        file.seek(0)
        assert probe(file) == probe(clip)


def test_a_decompressing_file_object_is_read_through_it(clip, tmp_path):
    """Its descriptor is that of the compressed file."""
    with gzip.open(tmp_path / "v.gz", "wb") as packed:
        packed.write(clip.read_bytes())
    with gzip.open(tmp_path / "v.gz") as packed:
        assert probe(packed).digest == probe(clip).digest
    with gzip.open(tmp_path / "v.gz") as packed:
        assert probe(io.BufferedReader(packed)).digest == probe(clip).digest


def test_any_view_of_bytes_is_their_content(clip):
    data = clip.read_bytes()
    doubled = bytes(byte for one in data for byte in (one, 0))
    for view in (memoryview(data), memoryview(doubled)[::2], memoryview(bytearray(data)).toreadonly()):
        assert probe(view).digest == probe(data).digest


def test_a_full_disk_is_one_sentence(clip, monkeypatch):
    class FullDisk(io.BytesIO):
        name = 7

        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FullDisk())
    for source in (clip.read_bytes(), io.BytesIO(clip.read_bytes())):
        with pytest.raises(VideoError, match=r"no copy of it can be kept .*; make room"):
            probe(source)


def test_file_objects_without_a_proc_file_system(clip, monkeypatch):
    """As on macOS, where /proc is missing."""
    monkeypatch.setattr("encoder.video.sources.DESCRIPTORS", "/nowhere")
    held = hold(io.BytesIO(clip.read_bytes()), DEFAULT_LIMITS)
    with open(clip, "rb") as file:
        in_place = hold(file, DEFAULT_LIMITS)
        for source in (held, held.source, in_place, in_place.source, file, clip.read_bytes()):
            assert probe(source).digest == probe(clip).digest
    path = held.source
    held.close()
    assert not os.path.exists(path)


def test_a_class_is_no_source():
    with pytest.raises(VideoError, match="cannot be a type"):
        probe(io.BytesIO)


def test_an_open_file_is_read_from_its_position(clip, tmp_path):
    (tmp_path / "shifted").write_bytes(b"head" + clip.read_bytes())
    with open(tmp_path / "shifted", "rb") as file:
        file.seek(4)
        assert probe(file).digest == probe(clip).digest


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe", "socket/x", "a\0b", "x" * 5000])
@pytest.mark.parametrize("trusted", [True, False])
def test_pipes_and_devices_are_refused_without_waiting(tmp_path, name, trusted):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoError, match=r"no such file|not a readable file"):
        probe(str(tmp_path / name) if not name.startswith("/") else name, trusted=trusted)


def test_an_untrusted_file_changed_while_it_is_read_is_refused(clip, monkeypatch):
    def write() -> None:
        with open(clip, "r+b") as file:
            file.write(b"\0\0\0\x01")

    around_decoding(monkeypatch, after=write)
    with pytest.raises(VideoError, match="changed while it was read"):
        probe(clip, trusted=False)


def test_a_file_removed_while_it_is_read_is_read(clip, monkeypatch):
    around_decoding(monkeypatch, after=clip.unlink)
    assert probe(clip, trusted=False).codec == "h264"


def test_readers_of_one_descriptor_do_not_disturb_each_other(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with open(tmp_path / "f", "rb") as file:
        name = descriptor_name(file.fileno(), "x.MP4")
        assert name.endswith(".mp4")
        first, second = open_file(name), open_file(name)
        assert first.read(3) == b"\0\1\2"
        assert second.read(2) == b"\0\1"
        assert second.seek(-2, os.SEEK_END) == 98
        assert second.read() == bytes((98, 99))
        assert first.read(1) == b"\3"
        raw = DescriptorReader(file.fileno(), name)
        assert raw.seek(5) == 5
        assert raw.seek(-1) == raw.seek(1 << 64) == -1
        assert raw.tell() == 5
        assert raw.seek(1 << 62) == 1 << 62
        assert raw.read(4) == b""
    assert descriptor_name(3, "/srv/x.a/b").count("/") == 0
    assert descriptor_name(3, "x.mp4/../../etc") == "fd:3"
