"""What a video file says about itself, and how much of that is true: read with PyAV before decoding.

Runs inside the decoding child process (decode_worker.py); imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from encoder.errors import VideoError
from encoder.handed import open_file, open_raw

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
    """Facts about one video stream. Sizes are upright; `turns` quarter turns (counter-clockwise) remain.

    start_s: time stamp of the first frame, which counts as t = 0.
    """

    width: int
    height: int
    turns: int
    duration_s: float
    claimed_s: float  # what the header says; more than duration_s where it lies or the file is cut
    frames: int | None
    codec: str
    container: str
    start_s: float = 0.0
    kind: str = "video"

    @property
    def lies(self) -> bool:
        return self.claimed_s - self.duration_s > max(LIE_S, LIE_SHARE * self.claimed_s)


@contextmanager
def open_container(path: str, rules: Rules) -> Iterator[Any]:
    """A PyAV input container that reads this one file (see handed.py) and closes with the block."""
    import av

    options = {"protocol_whitelist": "file"}
    if not rules.trusted:
        options["format_whitelist"] = SAFE_CONTAINERS
    with av.open(open_raw(path), container_options=options, metadata_errors="replace") as container:
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
    context.thread_count = rules.threads
    return stream


def codec_name(stream: Any) -> str:
    """The codec's own name ("av1"), whichever decoder reads it ("libdav1d")."""
    return str(stream.codec_context.codec.canonical_name)


def inspect(path: str, rules: Rules) -> Header:
    """Header of a video file: its first frame is decoded, its last packets are found, nothing else.

    Raises VideoError when there is no decodable video or a rule is broken.
    """
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        frame = _first_frame(container, stream)
        rules.check_pixels(frame.width, frame.height)
        zero = float((stamp(frame, stream) or 0) * stream.time_base)
        end, last = _ends_s(container, stream)
        if container.format.name == "avi":
            end += zero  # the decoder's delay is in the times of frames, not in those of packets
        claimed = _claimed_s(container, stream, zero, end, last)
        width, height, codec = frame.width, frame.height, codec_name(stream)
        turns = round(frame.rotation / 90) % 4
        name = container.format.name.split(",")[0]
        count = stream.frames or None
    if turns % 2:
        width, height = height, width
    header = Header(width, height, turns, max(end - zero, 0.0), claimed, count, codec, name, zero)
    rules.check_duration(header.duration_s)
    return header


def stamp(item: Any, stream: Any) -> int | None:
    """Time stamp of a packet or decoded frame, in ticks of the stream.

    AVI stores no presentation times and FFmpeg's guesses come out of order with reordered frames; the
    decoding times of frames in the order shown are those of a player, but for a constant delay.
    """
    if stream.container.format.name == "avi":
        return item.dts
    return item.pts if item.pts is not None else item.dts


def _first_frame(container: Any, stream: Any) -> Any:
    if stream.codec_context.width == 0:  # FFmpeg drops sizes that no decoder can handle
        raise VideoError("its frames have no usable size (none, or far too large); export it smaller")
    frame = next(container.decode(stream), None)
    if frame is None:
        raise VideoError("not one of its frames can be decoded; it is damaged or cut off, export it again")
    return frame


def _claimed_s(container: Any, stream: Any, zero: float, end: float, last: float) -> float:
    """Length of the pictures by the header, seconds; their true length where the header is right.

    end, last: where the pictures and where all streams really end. A container whose header has one length
    for all streams is right when its longest stream, maybe the sound, has that length.
    """
    if stream.duration is not None:
        claimed = float(stream.duration * stream.time_base)
        if container.format.name == "avi" and stream.frames and stream.average_rate:
            claimed = max(
                claimed, float(stream.frames / stream.average_rate)
            )  # duration follows the file size
        return claimed
    whole = container.duration / 1e6 if container.duration and not _guessed_length(container) else 0.0
    begin = (container.start_time or 0) / 1e6
    return end - zero if last - begin >= whole - LIE_S else whole


def _guessed_length(container: Any) -> bool:
    """Whether FFmpeg guessed the length from the bit rate: a Matroska header without its Duration element."""
    if "matroska" not in container.format.name:
        return False
    with open_file(container.name) as file:
        return b"\x44\x89" not in file.read(1 << 14)


def _ends_s(container: Any, stream: Any) -> tuple[float, float]:
    """Where the last readable picture and the last packet of any stream end, as time stamps in seconds.

    Demuxes only what follows the last key frame, or all of it where the file cannot seek.
    """
    import av

    for stamp in (1 << 62, stream.start_time or 0):
        try:
            container.seek(stamp, stream=stream)
        except av.error.FFmpegError:
            continue
        ends = _packet_ends_s(container, stream)
        if stream.index in ends:
            return ends[stream.index], max(ends.values())
    raise VideoError("none of its pictures can be read; it is damaged or cut off, export it again")


def _packet_ends_s(container: Any, stream: Any) -> dict[int, float]:
    """Demux to the end of the file without decoding: latest end of a packet per stream, seconds."""
    import av

    ends: dict[int, float] = {}
    rate = stream.guessed_rate or stream.average_rate
    packets = container.demux()
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):  # a damaged tail ends the file
            return ends
        pts = stamp(packet, packet.stream)
        if pts is None or packet.is_corrupt:
            continue
        length = float((packet.duration or 0) * packet.time_base)
        if not length and packet.stream_index == stream.index and rate:
            length = float(1 / rate)
        end = float(pts * packet.time_base) + length
        ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
