"""Read videos and images of any kind as a `Clip`: upright frames with the presentation time of each.

    clip = read_clip("cat.mp4", frames=16)
    clip.frames, clip.times_s, clip.info

Frames are chosen by presentation time, never by index, so that a variable frame rate is right. Decoding
runs in a child process that cannot outlive its limits (sandbox.py); no reader outlives the call.
A file that is cut off can be used as far as its requested frames are readable; else it is an error.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from torch import Tensor

from encoder.errors import VideoError
from encoder.video.digest import Hashing, file_digest, pixel_digest
from encoder.video.frame_times import shown_at, spread_times
from encoder.video.geometry import Crop, fit_within
from encoder.video.in_memory import is_animation, is_images, read_animation, read_images, shrink
from encoder.video.limits import DEFAULT_LIMITS, Limits
from encoder.video.protocol import CutPart, Request
from encoder.video.replies import Decoded
from encoder.video.sandbox import DecodeTimeout, WorkerCrashed, WorkerPool
from encoder.video.sources import OpenFile, open_source, reason, source_label

DECORD_SHARE = 0.6  # of the time limit; when decord hangs, PyAV has the rest
Decoder = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source without its frames.

    width, height: display pixels, which are square and upright, after cropping. duration_s: length of the
    video, 0.0 for one image. frames: count where the header has one. rotation: degrees (clockwise) by
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

    @property
    def pixels(self) -> int:
        """Of a frame that is decoded."""
        return self.width * self.height


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


def cropped(frames: Tensor, region: Crop | None) -> Tensor:
    """uint8 (T, H, W, 3) cut to a region, whose edges move outward to whole pixels."""
    if region is None:
        return frames
    height, width = frames.shape[1:3]
    left, top, right, bottom = region
    rows = slice(math.floor(top * height), max(math.ceil(bottom * height), math.floor(top * height) + 1))
    columns = slice(math.floor(left * width), max(math.ceil(right * width), math.floor(left * width) + 1))
    return frames[:, rows, columns]


_pool = WorkerPool()  # its idle children end by themselves after ten seconds
atexit.register(_pool.close)


def close_idle_workers() -> None:
    """End the decoding children that wait for the next file now, instead of some seconds later."""
    _pool.close()


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
        return _clip_of_images(source, fps, limits).info
    name = name or source_label(source)
    with open_source(source, limits, name) as file:
        return _info(*_read(_request(file, trusted, limits), file, name))


def read_clip(
    source: Any,
    frames: int = 16,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    at_s: Sequence[float] | None = None,
    moments: Sequence[float] | None = None,
    region: Crop | None = None,
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
    per second. An animated image (GIF, APNG, WebP, AVIF) is a video with its own times; a still image, or a
    video of one frame, is an image and gives T = 1. Transparency is composed on white; HDR values and
    colour profiles are not converted.
    at_s: exact times instead (seconds; sorted). moments: relative times in [start_s, end_s] instead, from 0
    (its start) to 1 (sorted). Each frame is the one a player shows at its time.
    region: left, top, right, bottom of the part of the upright picture that is read, as fractions of it.
    max_side: shrink frames whose longer side exceeds it while decoding.
    decoder: "auto" is decord for trusted files that it reads well, else PyAV. trusted=False: PyAV only,
    allowed codecs only, in a child process of its own. name: what errors call the source.
    Raises VideoError: one sentence, what was wrong and what to do.
    """
    _check(frames, start_s, end_s, at_s, moments, max_side, decoder, trusted)
    if is_images(source):
        return _clip_of_images(source, fps, limits, frames, start_s, end_s, at_s, moments, region, max_side)
    name = name or source_label(source)
    with open_source(source, limits, name) as file:
        request = replace(
            _request(file, trusted, limits),
            frames=frames,
            start_s=start_s,
            end_s=end_s,
            at_s=None if at_s is None else tuple(float(t) for t in at_s),
            moments=None if moments is None else tuple(float(m) for m in moments),
            region=region,
            max_side=max_side,
            decoder=decoder if trusted else "pyav",
        )
        decoded, digest = _read(request, file, name)
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


def _request(file: OpenFile, trusted: bool, limits: Limits) -> Request:
    """A request for the header of a file, within the limits."""
    return Request(
        path=file.name,
        rules=limits.rules(trusted, _threads()),
        decoder="auto" if trusted else "pyav",
        seconds=limits.seconds,
        memory_mib=limits.memory_mib,
        contained=limits.contained and not trusted,
    )


_shared = threading.local()


def share_cores() -> None:
    """From now on this thread reads beside others: what it reads is decoded in one thread, which costs the
    least CPU time."""
    _shared.on = True


def _threads() -> int:
    """Decoding threads: all cores up to 4, but one where others share the cores (`share_cores`, or a
    DataLoader worker)."""
    if getattr(_shared, "on", False):
        return 1
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return 1
    return min(4, os.cpu_count() or 1)


def cut_file(
    file: OpenFile,
    start_s: float,
    end_s: float,
    muxer: str,
    out: BinaryIO,
    trusted: bool,
    limits: Limits,
    name: str,
) -> CutPart:
    """A part of an open file, copied into `out` as a file of its own; `cut` (cut.py) is for callers.

    muxer: FFmpeg's name of its container. Raises VideoError, and OSError when `out` cannot be written.
    """
    request = replace(_request(file, trusted, limits), start_s=start_s, end_s=end_s, cut=muxer)
    try:
        return _pool.cut(request, file.descriptor, out, keep=trusted)
    except DecodeTimeout:
        raise VideoError(_too_long(request, name)) from None
    except VideoError as error:
        raise VideoError(f"Cannot cut {name}: {error}.") from error.__cause__


def sound_of(
    file: OpenFile, start_s: float, end_s: float | None, trusted: bool, limits: Limits, name: str
) -> bytearray:
    """The samples of an open file's sound; `read_sound` (sound.py) is for callers. Raises VideoError."""
    request = replace(_request(file, trusted, limits), start_s=start_s, end_s=end_s, sound=True)
    try:
        return _pool.listen(request, file.descriptor, keep=trusted)
    except DecodeTimeout:
        raise VideoError(_too_long(request, name)) from None
    except VideoError as error:
        raise VideoError(f"Cannot listen to {name}: {error}.") from error.__cause__


def _read(request: Request, file: OpenFile, name: str) -> tuple[Decoded, str]:
    """Decode an open file and hash it meanwhile; what is hashed is what was decoded."""
    until = time.monotonic() + request.seconds
    before = os.fstat(file.descriptor)
    trusted = request.rules.trusted
    try:
        with Hashing(file.descriptor, whole=not trusted or file.copied) as hashing:
            decoded = _decode(request, file.descriptor, name)
            digest = hashing.result(until)
        if not trusted and _changed(before, file.descriptor, digest):
            raise VideoError(
                f"Cannot read {name}: it was changed while it was read; try again when it is complete."
            )
    except (TimeoutError, FutureTimeout):
        raise VideoError(_too_long(request, name)) from None
    except OSError as error:
        raise VideoError(f"Cannot read {name}: {reason(error)}; check the disk it is on.") from error
    return decoded, digest


def _changed(before: os.stat_result, descriptor: int, digest: str) -> bool:
    """Whether a stranger may have written to the file since `before`; renaming and removing it do no harm."""
    after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return True
    return before.st_ctime_ns != after.st_ctime_ns and file_digest(descriptor) != digest


def _too_long(request: Request, name: str) -> str:
    return (
        f"Cannot read {name}: it took longer than {request.seconds:g} s; "
        "try a shorter or smaller video, or allow more seconds."
    )


def _decode(request: Request, file: int, name: str) -> Decoded:
    """Run a request in a child; where decord may have hung or crashed it, once more with PyAV."""
    started = time.monotonic()
    trusted = request.rules.trusted
    may_use_decord = trusted and request.decoder == "auto" and request.frames > 0
    share = DECORD_SHARE if may_use_decord else 1.0
    try:
        try:
            return _pool.decode(replace(request, seconds=share * request.seconds), file, keep=trusted)
        except (DecodeTimeout, WorkerCrashed):
            if not may_use_decord:
                raise
            left = request.seconds - (time.monotonic() - started)
            return _pool.decode(replace(request, seconds=left, decoder="pyav"), file, keep=trusted)
    except DecodeTimeout:
        raise VideoError(_too_long(request, name)) from None
    except VideoError as error:
        raise VideoError(f"Cannot read {name}: {error}.") from error.__cause__


def _info(decoded: Decoded, digest: str) -> VideoInfo:
    header = decoded.header
    return VideoInfo(
        kind="image" if header.kind == "image" else "video",
        width=header.width,
        height=header.height,
        duration_s=header.duration_s,
        frames=header.frames,
        codec=header.codec,
        container=header.container,
        rotation=(360 - 90 * header.turns) % 360,
        digest=digest,
    )


def _clip_of_images(
    source: Any,
    fps: float,
    limits: Limits,
    frames: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    at_s: Sequence[float] | None = None,
    moments: Sequence[float] | None = None,
    region: Crop | None = None,
    max_side: int | None = None,
) -> Clip:
    """Clip of images in memory, image i shown from i / fps on; frames=None keeps all of them.

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
    chosen = cropped(pixels[shown], region)
    chosen = shrink(chosen, fit_within(chosen.shape[2], chosen.shape[1], max_side))
    return Clip(chosen, tuple(pts[i] for i in shown), info)
