"""Small video files for tests, written with PyAV; each frame shows its own number."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest

if TYPE_CHECKING:
    from av.container import OutputContainer

    from encoder.video.reader import Clip

BITS = 12  # a frame's number is drawn as this many black or white bars
# container, encoder, pixel format, codec name
FORMATS = [
    ("mp4", "libx264", "yuv420p", "h264"),
    ("mov", "libx264", "yuv420p", "h264"),
    ("mkv", "libx264", "yuv420p", "h264"),
    ("avi", "libx264", "yuv420p", "h264"),
    ("mp4", "libx265", "yuv420p", "hevc"),
    ("mkv", "libx265", "yuv420p", "hevc"),
    ("webm", "libvpx", "yuv420p", "vp8"),
    ("webm", "libvpx-vp9", "yuv420p", "vp9"),
    ("mp4", "libsvtav1", "yuv420p", "av1"),
    ("webm", "libsvtav1", "yuv420p", "av1"),
    ("mp4", "mpeg4", "yuv420p", "mpeg4"),
    ("avi", "mpeg4", "yuv420p", "mpeg4"),
    ("mov", "mjpeg", "yuvj420p", "mjpeg"),
    ("avi", "mjpeg", "yuvj420p", "mjpeg"),
    ("gif", "gif", "rgb8", "gif"),
]
RAW = (".h264", ".hevc", ".ivf", ".m4v", ".y4m", ".obu", ".m2v", ".mjpeg")  # no container, or hardly one
_FAST = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "500k"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "500k"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}


def need_encoder(name: str) -> None:
    """Skip the calling test when this PyAV build cannot write a codec."""
    try:
        av.codec.Codec(name, "w")
    except (av.codec.codec.UnknownCodecError, ValueError):
        pytest.skip(f"this PyAV build has no encoder {name}")


def numbered(number: int, width: int = 192, height: int = 128) -> np.ndarray:
    """RGB uint8 (height, width, 3): BITS vertical bars, top half the number, bottom half red to green."""
    picture = np.zeros((height, width, 3), np.uint8)
    edges = [round(i * width / BITS) for i in range(BITS + 1)]
    for bit in range(BITS):
        if number >> bit & 1:
            picture[: height // 2, edges[bit] : edges[bit + 1]] = 255
    picture[height // 2 :, : width // 2, 0] = 220
    picture[height // 2 :, width // 2 :, 1] = 220
    return picture


def number_in(frame: np.ndarray) -> int:
    """The number that `numbered` drew, read from an upright frame of any size."""
    height, width = frame.shape[:2]
    row = np.asarray(frame)[height // 4].astype(int).mean(-1)
    edges = [round(i * width / BITS) for i in range(BITS + 1)]
    return sum(1 << bit for bit in range(BITS) if row[(edges[bit] + edges[bit + 1]) // 2] > 127)


def numbers_in(clip: Clip) -> list[int]:
    """The numbers of all frames of a clip."""
    return [number_in(frame.numpy()) for frame in clip.frames]


@contextmanager
def _ordinary_scheduling() -> Iterator[None]:
    """Takes back what SVT-AV1 does to the thread that calls it as root: it stays a real-time one."""
    try:
        yield
    finally:
        if hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@_ordinary_scheduling()
def write(
    path: Path,
    times_s: Sequence[float],
    *,
    encoder: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (192, 128),
    gop: int = 12,
    rotate: int = 0,
    last_s: float | None = None,
    options: dict[str, str] | None = None,
    sound_s: float = 0.0,
    rate: int = 25,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video whose frame i carries number i and is shown from times_s[i] on. size: (width, height)."""
    need_encoder(encoder)
    tick = Fraction(1, 100 if encoder == "gif" else 1000)
    if path.suffix == ".avi" or path.suffix in RAW:
        tick = Fraction(1, rate)
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(encoder, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = tick
        stream.time_base = tick
        stream.options = {**_FAST.get(encoder, {}), "g": str(gop), **(options or {})}
        if rotate:
            stream.set_display_rotation(rotate)
        sound = (
            container.add_stream("aac" if path.suffix in (".mp4", ".mov") else "mp2", rate=44100)
            if sound_s
            else None
        )
        ends = [*times_s[1:], last_s if last_s is not None else times_s[-1] + 1 / rate]
        durations: dict[int, int] = {}
        for i, (start, end) in enumerate(zip(times_s, ends, strict=True)):
            frame = av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24")
            if pix_fmt != "rgb24":
                frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(start / tick), tick
            frame.duration = durations[frame.pts] = round((end - start) / tick)
            _mux(container, stream.encode(frame), durations, tick)
        _mux(container, stream.encode(), durations, tick)
        if sound is not None:
            _write_sound(container, sound, sound_s)
    return path


def _mux(
    container: OutputContainer, packets: list[av.Packet], durations: dict[int, int], tick: Fraction
) -> None:
    for packet in packets:
        if packet.pts is not None and packet.pts in durations and packet.time_base == tick:
            packet.duration = durations[packet.pts]
        container.mux(packet)


def _write_sound(container: OutputContainer, stream: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 44100), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 44100, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def steady(count: int, fps: float = 25.0) -> list[float]:
    """Presentation times of `count` frames at a constant rate."""
    return [i / fps for i in range(count)]


def uneven(count: int, seed: int = 0) -> list[float]:
    """Presentation times with gaps between 0.02 and 0.6 s: a variable frame rate."""
    gaps = np.random.default_rng(seed).choice([0.02, 0.04, 0.1, 0.6], count - 1)
    return [0.0, *np.cumsum(gaps).round(3).tolist()]


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        _write_sound(container, container.add_stream("aac", rate=44100), 1.0)
    return path


def truncated(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def lying_matroska(source: Path, target: Path, seconds: float) -> Path:
    """A Matroska file whose Duration element claims another length."""
    data = bytearray(source.read_bytes())
    at = data.index(b"\x44\x89\x88")  # Duration, an 8-byte float, in ticks of 1 ms
    data[at + 3 : at + 11] = struct.pack(">d", seconds * 1000)
    target.write_bytes(data)
    return target


def rotated_by_matrix(source: Path, target: Path, degrees: int) -> Path:
    """An mp4 with another display matrix (clockwise degrees) and the same frames."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    data[at + 40 : at + 76] = struct.pack(">9i", *matrix)
    target.write_bytes(data)
    return target


def huge(path: Path, side: int = 20000) -> Path:
    """An MJPEG video whose single frame claims side x side pixels."""
    small = path.with_suffix(".small.avi")
    write(small, [0.0], encoder="mjpeg", pix_fmt="yuvj420p", size=(64, 64))
    data = bytearray(small.read_bytes())
    small.unlink()
    start = data.index(b"\xff\xc0")  # the frame header: height and width follow
    data[start + 5 : start + 9] = struct.pack(">HH", side, side)
    header = data.index(b"strf") + 8  # BITMAPINFOHEADER: its size, width, height
    data[header + 4 : header + 12] = struct.pack("<ii", side, side)
    path.write_bytes(data)
    return path
