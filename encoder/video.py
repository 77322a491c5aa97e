"""Videos and images of any kind become a `Clip`: upright frames with the real time of each.

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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from .containers import Rules
from .digest import file_digest, pixel_digest
from .errors import VideoError
from .pictures import is_pictures, read_pictures
from .sandbox import Decoded, OutOfTime, Sandbox

UNTRUSTED_CODECS = tuple("h264 hevc vp8 vp9 av1 mpeg4 mjpeg gif png jpeg webp bmp".split())
DECORD_SHARE = 0.6  # of the time limit; when decord hangs, PyAV has the rest
Decoder = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True)
class Limits:
    """What one read may cost; a VideoError says which limit a file breaks.

    seconds: wall clock. memory_mib: address space of the decoding child, and size of the frames returned.
    max_pixels: width x height of one frame. max_duration_s: None is any. max_bytes: size of the file.
    codecs: allowed codecs; None is UNTRUSTED_CODECS for untrusted sources and any codec for trusted ones.
    """

    seconds: float = 20.0
    memory_mib: int = 3072
    max_pixels: int = 8192 * 8192
    max_duration_s: float | None = None
    max_bytes: int = 16 * 2**30
    codecs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source without its frames.

    width, height: upright pixels. duration_s: length of the pictures, 0.0 for one image. frames: count
    where the header has one. rotation: degrees (clockwise) by which stored frames were turned.
    digest: hash of the content, a cache key.
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


_sandbox = Sandbox()  # holds idle children only; they end by themselves after ten seconds
atexit.register(_sandbox.close)


def probe(source: Any, *, trusted: bool = True, limits: Limits = Limits(), fps: float = 1.0) -> VideoInfo:
    """Size, duration, codec and content hash of a source; decodes at most one frame.

    Of a file that is cut off, duration_s is the part that can be read. Raises VideoError.
    """
    if is_pictures(source):
        return _from_pictures(source, fps, limits).info
    with _as_file(source, limits) as path:
        request = _request(path, 0, trusted, limits, "auto", None)
        decoded = _decode(request, trusted, _name(source))
        return _info(decoded, file_digest(path))


def read_clip(
    source: Any,
    frames: int = 16,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    at_s: Sequence[float] | None = None,
    max_side: int | None = None,
    decoder: Decoder = "auto",
    trusted: bool = True,
    limits: Limits = Limits(),
    fps: float = 1.0,
) -> Clip:
    """Read `frames` frames from the middles of as many equal parts of [start_s, end_s].

    source: path, bytes, binary file object, one image, a list of images (PIL, array, tensor) or a uint8
    array (T, H, W, 3). at_s: exact times instead (seconds; sorted). Each frame is the one a player shows
    at its time. A still image gives T = 1. Lists and arrays count as a video of `fps` frames per second.
    max_side: shrink frames whose longer side exceeds it while decoding.
    decoder: "auto" is decord for trusted files that it reads well, else PyAV. trusted=False: PyAV only,
    allowed codecs only, in a child process of its own.
    Raises VideoError: one sentence, what was wrong and what to do.
    """
    _check(frames, start_s, end_s, at_s, max_side, decoder, trusted)
    if is_pictures(source):
        return _from_pictures(source, fps, limits, frames, start_s, end_s, at_s, max_side)
    with _as_file(source, limits) as path:
        request = _request(path, frames, trusted, limits, decoder, max_side)
        request.update(start_s=start_s, end_s=end_s, at_s=None if at_s is None else [float(t) for t in at_s])
        decoded = _decode(request, trusted, _name(source))
        return Clip(decoded.frames, decoded.times_s, _info(decoded, file_digest(path)))
