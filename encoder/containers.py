"""What a video file says about itself, and how much of that is true: read with PyAV before decoding.

Runs inside the decoding child process (decode_worker.py); imports neither torch nor numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import VideoError

# Demuxers an untrusted file may use: none of them opens a second file or a network address.
SAFE_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
LIE_S, LIE_SHARE = 1.0, 0.05  # a stated length may exceed the true one by this much before it is a lie


@dataclass(frozen=True)
class Rules:
    """What a file must keep to; None means no limit. Plain values, because they travel as JSON."""

    trusted: bool
    codecs: tuple[str, ...] | None
    max_pixels: int
    max_duration_s: float | None
    threads: int

    def check_codec(self, codec: str) -> None:
        """Raises VideoError, naming the codec, when it is not allowed."""
        if self.codecs is not None and codec not in self.codecs:
            allowed = ", ".join(self.codecs)
            raise VideoError(f"the codec {codec!r} is not allowed here; convert the file to one of {allowed}")

    def check_pixels(self, width: int, height: int) -> None:
        """Raises VideoError, naming size and limit, when frames are too large."""
        if width * height > self.max_pixels:
            raise VideoError(
                f"its frames of {width} x {height} pixels exceed the limit of {self.max_pixels} pixels; "
                "scale the video down first"
            )

    def check_duration(self, duration_s: float) -> None:
        """Raises VideoError when a video lasts longer than allowed."""
        if self.max_duration_s is not None and duration_s > self.max_duration_s:
            raise VideoError(
                f"it lasts {duration_s:.1f} s, more than the allowed {self.max_duration_s:g} s; cut it first"
            )


@dataclass(frozen=True)
class Header:
    """Facts about one video stream. Sizes are upright; `turns` quarter turns (counter-clockwise) remain."""

    width: int
    height: int
    turns: int
    duration_s: float
    claimed_s: float  # what the header says; more than duration_s where it lies or the file is cut
    frames: int | None
    codec: str
    container: str
    kind: str = "video"

    @property
    def lies(self) -> bool:
        return self.claimed_s - self.duration_s > max(LIE_S, LIE_SHARE * self.claimed_s)


@contextmanager
def open_container(path: str, rules: Rules) -> Iterator[Any]:
    """A PyAV input container that reads this one local file and closes with the block."""
    import av

    options = {"protocol_whitelist": "file"}
    if not rules.trusted:
        options["format_whitelist"] = SAFE_CONTAINERS
    with av.open(os.path.abspath(path), container_options=options, metadata_errors="replace") as container:
        yield container


def video_stream(container: Any, rules: Rules) -> Any:
    """The video stream to decode, its codec checked before the decoder is opened.

    Raises VideoError when there is none (cover art of a song does not count) or it is not allowed.
    """
    import av

    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        what = "only sound" if container.streams.audio else "no pictures"
        raise VideoError(f"it holds {what}; give a file with a video stream")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    context = stream.codec_context
    if context is None:
        raise VideoError("its codec is unknown to this PyAV build; convert the file to h264")
    rules.check_codec(codec_name(stream))
    rules.check_pixels(context.width, context.height)
    context.options = {"max_pixels": str(rules.max_pixels)}
    context.thread_count = rules.threads
    return stream


def codec_name(stream: Any) -> str:
    """The codec's own name ("av1"), whichever decoder reads it ("libdav1d")."""
    return str(stream.codec_context.codec.canonical_name)


def origin(stream: Any) -> float:
    """Time stamp, in seconds, that counts as t = 0."""
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def inspect(path: str, rules: Rules) -> Header:
    """Header of a video file: its first frame is decoded, its last packets are found, nothing else.

    Raises VideoError when there is no decodable video or a rule is broken.
    """
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        zero = origin(stream)
        claimed = _claimed_seconds(container, stream, zero)
        frame = _first_frame(container, stream)
        rules.check_pixels(frame.width, frame.height)
        if frame.pts is not None and stream.start_time is None:
            zero = float(frame.pts * stream.time_base)
        end = _end_seconds(container, stream) - zero
        alone = stream.duration is not None or len(container.streams) == 1
        width, height, codec = frame.width, frame.height, codec_name(stream)
        turns = round(frame.rotation / 90) % 4
        name = container.format.name.split(",")[0]
        count = stream.frames or None
    if turns % 2:
        width, height = height, width
    # another stream (sound) may last longer than the pictures: then the container's length says nothing
    claimed = claimed if alone else end
    header = Header(width, height, turns, max(end, 0.0), claimed, count, codec, name)
    rules.check_duration(header.duration_s)
    return header


def _first_frame(container: Any, stream: Any) -> Any:
    frame = next(container.decode(stream), None)
    if frame is None:
        raise VideoError("not one of its frames can be decoded; it is damaged or cut off, export it again")
    return frame


def _claimed_seconds(container: Any, stream: Any, zero: float) -> float:
    """Length that the header states for the pictures, seconds; 0 when it states none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 - max(zero, 0.0) if container.duration else 0.0


def _end_seconds(container: Any, stream: Any) -> float:
    """Time stamp at which the last readable frame ends, from the packets after the last key frame."""
    import av

    for target in (1 << 62, 0):
        try:
            container.seek(target if target else (stream.start_time or 0), stream=stream)
        except av.error.FFmpegError:
            continue
        end = _last_packet_end(container, stream)
        if end is not None:
            return end
    raise VideoError("none of its pictures can be read; it is damaged or cut off, export it again")


def _last_packet_end(container: Any, stream: Any) -> float | None:
    """Demux to the end of the file without decoding: latest pts + duration in seconds, None if no packet."""
    last: int | None = None
    end: int | None = None
    rate = stream.guessed_rate or stream.average_rate
    for packet in container.demux(stream):
        pts = packet.pts if packet.pts is not None else packet.dts
        if pts is None or packet.is_corrupt:
            continue
        if last is None or pts > last:
            length = packet.duration or (round(1 / (rate * packet.time_base)) if rate else 0)
            last, end = pts, pts + length
    return None if end is None else float(end * stream.time_base)
