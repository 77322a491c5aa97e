"""Videos and images of any kind become a `Clip`: upright frames with the real time of each.

    clip = read_clip("cat.mp4", frames=16)
    clip.frames, clip.times_s, clip.info

Frames are chosen by presentation time, never by index, so that a variable frame rate is right. Decoding
runs in a child process that cannot outlive its limits (sandbox.py); no reader outlives the call.
A file that is cut off can be used as far as its requested frames are readable; else it is an error.
"""

from __future__ import annotations

import atexit
import errno
import io
import math
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from encoder.errors import VideoError
from encoder.video.containers import Rules
from encoder.video.digest import Hashing, file_digest, pixel_digest
from encoder.video.frame_times import fit_within, shown_at, spread_times
from encoder.video.in_memory import is_animation, is_images, read_animation, read_images, shrink
from encoder.video.sandbox import WorkerCrashed, Decoded, DecodeTimeout, WorkerPool
from encoder.video.worker import PASSES_DESCRIPTORS

UNTRUSTED_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"),
    *("gif", "png", "jpeg", "webp", "bmp"),
    "rawvideo",  # y4m
)
DECORD_SHARE = 0.6  # of the time limit; when decord hangs, PyAV has the rest
Decoder = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True)
class Limits:
    """What one read may cost; a VideoError says which limit a file breaks.

    seconds: wall clock. memory_mib: address space of the decoding child, and size of the frames returned.
    max_pixels: width x height of one frame. max_duration_s: None is any. max_bytes: size of the file.
    codecs: allowed codecs; None is UNTRUSTED_CODECS for untrusted sources and any codec for trusted ones.
    contained: refuse untrusted sources on a machine that cannot confine their decoder (`confine.report`); by
    default they are read there as well, with a child process, its limits and an empty environment only.
    """

    seconds: float = 20.0
    memory_mib: int = 3072
    max_pixels: int = 8192 * 8192
    max_duration_s: float | None = None
    max_bytes: int = 16 * 2**30
    codecs: tuple[str, ...] | None = None
    contained: bool = False


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source without its frames.

    width, height: display pixels, which are square and upright, after cropping. duration_s: length of the
    pictures, 0.0 for one image. frames: count where the header has one. rotation: degrees (clockwise) by
    which stored frames were turned, after they were mirrored where the file says so.
    digest: hash of the content (digest.py), a cache key: two different sources never share one.
    """

    kind: Literal["video", "image", "frames"]
    width: int
    height: int
    duration_s: float
    frames: int | None
    codec: str
    container: str
    rotation: int
    digest: str


@dataclass(frozen=True)
class Clip:
    """Frames of one source: uint8 (T, H, W, 3), RGB, upright, on the CPU, each with its real time.

    times_s: presentation time of each frame in seconds from the start of the stream, ascending.
    """

    frames: Tensor
    times_s: tuple[float, ...]
    info: VideoInfo

    @property
    def duration_s(self) -> float:
        return self.info.duration_s


DEFAULT_LIMITS = Limits()
_sandbox = WorkerPool()  # holds idle children only; they end by themselves after ten seconds
atexit.register(_sandbox.close)


def probe(
    source: Any,
    *,
    trusted: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    fps: float = 1.0,
    name: str | None = None,
) -> VideoInfo:
    """Size, duration, codec and content hash of a source; decodes at most one frame.

    Of a file that is cut off, duration_s is the part that can be read. name: what errors call the source
    (default: the file's own). Raises VideoError.
    """
    if is_images(source):
        return _from_pictures(source, fps, limits).info
    name = name or _name(source)
    with _as_file(source, limits, name) as file:
        request = _request(file.name, 0, trusted, limits, "auto", None)
        return _info(*_read(request, file, trusted, name))


def read_clip(
    source: Any,
    frames: int = 16,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    at_s: Sequence[float] | None = None,
    moments: Sequence[float] | None = None,
    max_side: int | None = None,
    decoder: Decoder = "auto",
    trusted: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    fps: float = 1.0,
    name: str | None = None,
) -> Clip:
    """Read `frames` frames from the middles of as many equal parts of [start_s, end_s].

    source: path, bytes, binary file object, one image, a list of images (PIL, array, tensor) or an array
    (T, H, W, C) of uint8 or uint16, C = 1, 3 or 4 (RGBA). Lists and arrays count as a video of `fps` frames
    per second. An image that moves (GIF, APNG, WebP, AVIF) is a video with its own times; a still, or a
    video of one picture, is an image and gives T = 1. What is transparent becomes white; HDR values and
    colour profiles are left alone.
    at_s: exact times instead (seconds; sorted). moments: places in [start_s, end_s] instead, from 0 (its
    start) to 1 (sorted). Each frame is the one a player shows at its time.
    max_side: shrink frames whose longer side exceeds it while decoding.
    decoder: "auto" is decord for trusted files that it reads well, else PyAV. trusted=False: PyAV only,
    allowed codecs only, in a child process of its own. name: what errors call the source.
    Raises VideoError: one sentence, what was wrong and what to do.
    """
    _check(frames, start_s, end_s, at_s, moments, max_side, decoder, trusted)
    if is_images(source):
        return _from_pictures(source, fps, limits, frames, start_s, end_s, at_s, moments, max_side)
    name = name or _name(source)
    with _as_file(source, limits, name) as file:
        request = _request(file.name, frames, trusted, limits, decoder, max_side)
        request.update(start_s=start_s, end_s=end_s)
        if at_s is not None:
            request.update(at_s=[float(t) for t in at_s], max_count=len(at_s))
        if moments is not None:
            request.update(moments=[float(m) for m in moments], max_count=len(moments))
        decoded, digest = _read(request, file, trusted, name)
        return Clip(decoded.frames, decoded.times_s, _info(decoded, digest))


def _check(
    frames: int,
    start_s: float | None,
    end_s: float | None,
    at_s: Sequence[float] | None,
    moments: Sequence[float] | None,
    max_side: int | None,
    decoder: str,
    trusted: bool,
) -> None:
    """Raises VideoError for arguments that no video could satisfy."""
    if at_s is None and frames < 1:
        raise VideoError(f"Cannot read {frames} frames; ask for at least 1.")
    if at_s is not None and (len(at_s) == 0 or start_s is not None or end_s is not None):
        raise VideoError("Give at_s at least one time, and without start_s and end_s.")
    if moments is not None and (not moments or at_s is not None or not all(0 <= m <= 1 for m in moments)):
        raise VideoError("Give moments at least one place from 0 to 1, and without at_s.")
    if any(not math.isfinite(t) or t < 0 for t in (start_s or 0.0, end_s or 0.0, *(at_s or ()))):
        raise VideoError("Times must be seconds from 0 up; give finite, non-negative numbers.")
    if max_side is not None and max_side < 1:
        raise VideoError(f"max_side cannot be {max_side}; give at least 1 pixel or None.")
    if decoder not in ("auto", "decord", "pyav"):
        raise VideoError(f"There is no decoder {decoder!r}; use 'auto', 'decord' or 'pyav'.")
    if decoder == "decord" and not trusted:
        raise VideoError("decord is only for trusted files; use decoder='auto' for untrusted ones.")


def _request(
    path: str, frames: int, trusted: bool, limits: Limits, decoder: str, max_side: int | None
) -> dict[str, Any]:
    """What the decoding child needs to know, as JSON values."""
    codecs = limits.codecs if limits.codecs is not None or trusted else UNTRUSTED_CODECS
    rules = Rules(trusted, codecs, limits.max_pixels, limits.max_duration_s, _threads())
    return {
        "path": path,
        "frames": frames,
        "max_count": frames,
        "start_s": None,
        "end_s": None,
        "at_s": None,
        "moments": None,
        "max_side": max_side,
        "decoder": decoder if trusted else "pyav",
        "rules": asdict(rules),
        "seconds": limits.seconds,
        "memory_mib": limits.memory_mib,
        "max_bytes_out": limits.memory_mib * 2**20,
        "contained": limits.contained and not trusted,
        "load_all": False,
    }


def _threads() -> int:
    """Decoding threads: all cores up to 4, but one in a DataLoader worker, which shares the cores."""
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return 1
    return min(4, os.cpu_count() or 1)


def _read(request: dict[str, Any], file: _Opened, trusted: bool, name: str) -> tuple[Decoded, str]:
    """Decode an open file and hash it meanwhile; what is hashed is what was decoded."""
    until = time.monotonic() + request["seconds"]
    before = os.fstat(file.descriptor)
    try:
        with Hashing(file.descriptor, whole=not trusted or file.copied) as hashing:
            decoded = _decode(request, file.descriptor, trusted, name)
            digest = hashing.result(until)
        if not trusted and _changed(before, file.descriptor, digest):
            raise VideoError(
                f"Cannot read {name}: it was changed while it was read; try again when it is complete."
            )
    except (TimeoutError, FutureTimeout):
        raise VideoError(_too_long(request, name)) from None
    except OSError as error:
        raise VideoError(f"Cannot read {name}: {_reason(error)}; check the disk it is on.") from error
    return decoded, digest


def _changed(before: os.stat_result, descriptor: int, digest: str) -> bool:
    """Whether a stranger may have written to the file since `before`; renaming and removing it do no harm."""
    after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return True
    return before.st_ctime_ns != after.st_ctime_ns and file_digest(descriptor) != digest


def _too_long(request: dict[str, Any], name: str) -> str:
    return (
        f"Cannot read {name}: it took longer than {request['seconds']:g} s; "
        "try a shorter or smaller video, or allow more seconds."
    )


def _decode(request: dict[str, Any], file: int, trusted: bool, name: str) -> Decoded:
    """Run a request in a child; where decord may have hung or crashed it, once more with PyAV."""
    started = time.monotonic()
    may_use_decord = trusted and request["decoder"] == "auto" and request["frames"]
    share = DECORD_SHARE if may_use_decord else 1.0
    try:
        try:
            return _sandbox.decode({**request, "seconds": share * request["seconds"]}, file, keep=trusted)
        except (DecodeTimeout, WorkerCrashed):
            if not may_use_decord:
                raise
            left = request["seconds"] - (time.monotonic() - started)
            return _sandbox.decode({**request, "seconds": left, "decoder": "pyav"}, file, keep=trusted)
    except DecodeTimeout:
        raise VideoError(_too_long(request, name)) from None
    except VideoError as error:
        raise VideoError(f"Cannot read {name}: {error}.") from error.__cause__


def _info(decoded: Decoded, digest: str) -> VideoInfo:
    header = decoded.header
    return VideoInfo(
        kind="image" if header["kind"] == "image" else "video",
        width=int(header["width"]),
        height=int(header["height"]),
        duration_s=float(header["duration_s"]),
        frames=header["frames"],
        codec=str(header["codec"]),
        container=str(header["container"]),
        rotation=(360 - 90 * int(header["turns"])) % 360,
        digest=digest,
    )


def _name(source: Any) -> str:
    return (
        repr(os.path.basename(os.fspath(source))) if isinstance(source, (str, os.PathLike)) else "the video"
    )


@dataclass(frozen=True)
class _Opened:
    """A regular file, opened once for reading: what is checked is what is hashed and decoded.

    name: as the caller calls it. copied: it is a copy made for this call.
    """

    descriptor: int
    name: str
    copied: bool = False


@contextmanager
def _as_file(source: Any, limits: Limits, name: str) -> Iterator[_Opened]:
    """The source as an open regular file; a temporary one without a name for bytes and one-pass sources.

    A file object that is a regular file at its start is read in place, and stays where it is.
    Raises VideoError when there is no such file, or it is empty, too large or not a file.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.path.abspath(os.fsdecode(source))
        descriptor = _open(path, name)
        try:
            _check_file(descriptor, name, limits)
            yield _Opened(descriptor, path)
        finally:
            os.close(descriptor)
    elif (own := _descriptor_of(source)) is not None:
        descriptor = _open_again(own, name)
        try:
            _check_file(descriptor, name, limits)
            yield _Opened(descriptor, str(source.name))
        finally:
            os.close(descriptor)
    elif isinstance(source, (bytes, bytearray, memoryview)) or _can_be_read(source):
        with _temporary_file() as file:
            _copy(source, file, limits)
            file.flush()
            _check_file(file.fileno(), name, limits)
            yield _Opened(file.fileno(), str(file.name), copied=True)
    else:
        raise VideoError(f"A video cannot be a {type(source).__name__}; give a path, bytes, file or images.")


def _can_be_read(source: Any) -> bool:
    return callable(getattr(source, "read", None)) and not isinstance(source, type)


def _temporary_file() -> Any:
    """A file that is gone with its descriptor; with a name only where the child needs one (Windows)."""
    make = tempfile.TemporaryFile if PASSES_DESCRIPTORS else tempfile.NamedTemporaryFile
    return make(prefix="fluxchat-")


def _descriptor_of(source: Any) -> int | None:
    """Descriptor of a file object that is a regular file, read as it is, at its start; else None."""
    file = getattr(source, "file", source)  # tempfile wraps its files
    raw = getattr(file, "raw", file)
    if not PASSES_DESCRIPTORS or not isinstance(file, (io.BufferedReader, io.BufferedRandom, io.FileIO)):
        return None
    if not isinstance(raw, io.FileIO) or raw.closed or not raw.readable():
        return None
    descriptor = raw.fileno()
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or file.tell() != 0:
        return None
    file.flush()
    return descriptor


def _open(path: str, name: str) -> int:
    """Open a path for reading without waiting for anybody, whatever it turns out to be."""
    flags = (getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
    try:
        return os.open(path, os.O_RDONLY | sum(flags))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise VideoError(f"Cannot read {name}: there is no such file; check the path.") from error
        if os.path.isdir(path):
            raise VideoError(_DIRECTORY.format(name)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENXIO):
            raise VideoError(_UNREADABLE.format(name)) from error
        raise VideoError(f"Cannot read {name}: {_reason(error)}; try again.") from error
    except ValueError as error:  # a zero byte in the name
        raise VideoError(f"Cannot read {name}: there is no such file; check the path.") from error


def _open_again(descriptor: int, name: str) -> int:
    """A descriptor of the same file that cannot write and, on Linux, has a position of its own."""
    import fcntl

    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return os.dup(descriptor)
        raise VideoError(f"Cannot read {name}: open it for reading only, in binary mode ('rb').") from error


_DIRECTORY = "Cannot read {}: it is a directory; give one video or image file."
_UNREADABLE = "Cannot read {}: it is not a readable file; check its kind and permissions."


def _check_file(descriptor: int, name: str, limits: Limits) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(_DIRECTORY.format(name))
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(_UNREADABLE.format(name))
    if status.st_size == 0:
        raise VideoError(f"Cannot read {name}: it is empty (0 bytes); export or download it again.")
    if status.st_size > limits.max_bytes:
        raise VideoError(
            f"Cannot read {name}: {status.st_size} bytes exceed the limit of {limits.max_bytes}; "
            "cut or compress it."
        )


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _copy(source: Any, file: Any, limits: Limits) -> None:
    """Write bytes or a binary file object's rest to a file, at most one byte over the limit."""
    if not hasattr(source, "read"):
        view = memoryview(source)
        file.write((view if view.c_contiguous else memoryview(bytes(view)))[: limits.max_bytes + 1])
        return
    left = limits.max_bytes + 1
    while left and (block := source.read(min(1 << 20, left))):
        if not isinstance(block, (bytes, bytearray)):
            raise VideoError("The file object gives text; open the video in binary mode ('rb').")
        left -= file.write(block)


def _from_pictures(
    source: Any,
    fps: float,
    limits: Limits,
    frames: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    at_s: Sequence[float] | None = None,
    moments: Sequence[float] | None = None,
    max_side: int | None = None,
) -> Clip:
    """Clip of images in memory, picture i shown from i / fps on; frames=None keeps all of them.

    An opened animation (GIF, APNG, WebP, AVIF) keeps its own times.
    """
    if not fps > 0:
        raise VideoError(f"fps cannot be {fps}; give the pictures per second, above 0.")
    ends = None
    if is_animation(source):
        pixels, ends = read_animation(source, limits.max_pixels, limits.memory_mib * 2**20)
    else:
        pixels = read_images(source, limits.max_pixels)
    total, height, width = pixels.shape[:3]
    single = total == 1 and not isinstance(source, (list, tuple))
    duration = 0.0 if single else ends[-1] if ends else total / fps
    pts = [0.0, *ends[:-1]] if ends else [i / fps for i in range(total)]
    info = VideoInfo(
        kind="image" if single else "video" if ends else "frames",
        width=width,
        height=height,
        duration_s=duration,
        frames=total,
        codec="raw",
        container="memory",
        rotation=0,
        digest=pixel_digest(pixels, tuple(pts), "image" if single else "frames", duration),
    )
    if frames is None:
        return Clip(pixels, tuple(pts), info)
    last = min(end_s, duration) if end_s is not None else duration
    wanted = sorted(at_s) if at_s is not None else spread_times(start_s or 0.0, last, frames, moments)
    if single:
        wanted = [0.0]
    elif wanted[-1] > duration or wanted != sorted(wanted):
        raise VideoError(f"The pictures last only {duration:g} s; ask for times within.")
    shown = shown_at(pts, wanted)
    chosen = shrink(pixels[shown], fit_within(width, height, max_side))
    return Clip(chosen, tuple(pts[i] for i in shown), info)
