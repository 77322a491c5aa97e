"""Headers of video files: size, duration and codec by PyAV, the stated duration checked against the packets.

Runs inside the decoding child process (worker.py); imports neither torch nor numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from encoder.errors import VideoError
from encoder.video.descriptors import open_file, open_unbuffered
from encoder.video.geometry import DisplayGeometry, container_crop, display_geometry
from encoder.video.limits import Rules

# Raw streams: packets have an order and mostly a rate, but no times that could be trusted, and no index.
COUNTED = frozenset(
    ("h264", "hevc", "vvc", "evc", "obu", "m4v", "mpegvideo", "mjpeg", "h263", "h261", "vc1", "cavsvideo")
)
# Demuxers an untrusted file may use: none of them opens a second file or a network address.
SAFE_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,ivf,h264,hevc,obu,m4v,yuv4mpegpipe"
TOLERANCE_S, TOLERANCE_SHARE = 1.0, 0.05  # a stated length may exceed the readable one by this much
LAST_TICK = 1 << 62
BACK_S = (3.0, 30.0, 0.0)  # steps back from the end to a key frame, where a file has no index
MAX_DELAY = 16  # frames that a decoder holds back; an AVI whose first frame is later begins with nothing
DEFAULT_FPS = 25  # of a raw stream that names no rate, as in FFmpeg


@dataclass(frozen=True)
class Header(DisplayGeometry):
    """Facts about one video stream, beside the shape of its frames.

    claimed_s: length by the header; duration_s: length that can be read, less where the file is cut off.
    start_s: time stamp of the first frame, which counts as t = 0. step: ticks from one frame to the next
    where frames are counted because they carry no times, else 0. kind "image": it holds one frame.
    pillow: Pillow reads it, not FFmpeg.
    """

    duration_s: float = 0.0
    claimed_s: float = 0.0
    frames: int | None = None
    codec: str = ""
    container: str = ""
    start_s: float = 0.0
    step: int = 0
    kind: str = "video"
    pillow: bool = False

    @property
    def overstated(self) -> bool:
        """Whether the header states a longer video than can be read: it is wrong, or the file is cut off."""
        return self.claimed_s - self.duration_s > max(TOLERANCE_S, TOLERANCE_SHARE * self.claimed_s)


@contextmanager
def open_container(path: str, rules: Rules) -> Iterator[Any]:
    """A PyAV input container that reads this one file (see descriptors.py) and closes with the block."""
    import av

    options = {"protocol_whitelist": "file"}
    if not rules.trusted:
        options["format_whitelist"] = SAFE_CONTAINERS
    with av.open(open_unbuffered(path), container_options=options, metadata_errors="replace") as container:
        yield container


def video_stream(container: Any, rules: Rules) -> Any:
    """The video stream to decode, its codec checked before the decoder is opened.

    Raises VideoError when there is none (cover art of a song does not count) or it is not allowed.
    """
    import av

    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        content = "only sound" if container.streams.audio else "no pictures"
        raise VideoError(f"it holds {content}; give a file with a video stream")
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

    All packets are read where a file cannot seek. A file that holds exactly one frame is an image.
    Raises VideoError when there is no decodable video or a rule is broken.
    """
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        crop = container_crop(container, stream)
        frame, first_stamp = _first_frame(container, stream)
        rules.check_pixels(frame.width, frame.height)
        shape = display_geometry(frame, stream, crop)
        name, codec = container.format.name.split(",")[0], codec_name(stream)
        if (shape.turns and name != "mov") or has_alpha(frame, codec) or has_webm_alpha(stream):
            shape = replace(shape, plain=False)
        header = Header(**vars(shape), frames=stream.frames or None, codec=codec, container=name)
        rules.check_pixels(header.width, header.height)
        first = timestamp(frame, stream) or 0
        delay = first - first_stamp if name == "avi" and first_stamp is not None else 0
        delay = delay if delay <= MAX_DELAY else 0
        length = None if name in COUNTED else _length(container, stream, first, delay, header, seek=True)
    if length is None:
        with open_container(path, rules) as container:
            stream = video_stream(container, rules)
            if name in COUNTED:
                length = _counted(container, stream, header)
            else:
                length = _length(container, stream, first, delay, header, seek=False)
    if length is None:
        raise VideoError("none of its pictures can be read; it is damaged or cut off, export it again")
    if length.frames == 1 and not length.overstated and _holds_one(path, rules):
        if name == "gif" and not _ends_with(path, b";"):  # the decoder does not mind half a frame
            raise VideoError("it is cut off; export or download it again")
        return replace(length, kind="image", duration_s=0.0, claimed_s=0.0)
    rules.check_duration(length.duration_s)
    return length


def has_alpha(frame: Any, codec: str) -> bool:
    """Whether a decoded frame has transparency; the fourth byte of uncompressed video is mere filling."""
    return codec != "rawvideo" and any(part.is_alpha for part in frame.format.components)


def has_webm_alpha(stream: Any) -> bool:
    """Whether a WebM stream has transparency beside its frames, which FFmpeg's own decoders leave out."""
    return codec_name(stream) in ("vp8", "vp9") and stream.metadata.get("alpha_mode") == "1"


def timestamp(item: Any, stream: Any) -> int | None:
    """Time stamp of a packet or decoded frame, in ticks of the stream.

    AVI stores no presentation times and FFmpeg's guesses come out of order with reordered frames; the
    decoding times of frames in the order shown are those of a player, but for a constant delay.
    """
    if stream.container.format.name == "avi":
        return item.dts
    return item.pts if item.pts is not None else item.dts


def _first_frame(container: Any, stream: Any) -> tuple[Any, int | None]:
    """The first frame that can be decoded, and the time stamp of the first packet that holds anything."""
    import av

    if stream.codec_context.width == 0:  # FFmpeg drops sizes that no decoder can handle
        raise VideoError("its frames have no usable size (none, or far too large); export it smaller")
    first_stamp, damage = None, None
    for packet in container.demux(stream):
        if first_stamp is None and packet.size:
            first_stamp = timestamp(packet, stream)
        try:
            for frame in packet.decode():
                return frame, first_stamp
        except av.error.InvalidDataError as error:  # a recording that begins between two key frames, say
            damage = error
    raise VideoError(
        "not one of its frames can be decoded; it is damaged or cut off, export it again"
    ) from damage


def _length(
    container: Any, stream: Any, first: int, delay: int, header: Header, *, seek: bool
) -> Header | None:
    """The header with start, length and claimed length; frames=1 where there may be one frame only.

    first: time stamp of the first frame. delay: ticks by which the times of frames are behind those of
    packets. seek: go to the end at once, instead of reading all up to it.
    None where no frame can be read that way.
    """
    zero = float(first * stream.time_base)
    tail = _last_packets(container, stream, zero) if seek else _packets(container, stream)
    if tail is None:
        return None
    end = tail.end_s + float(delay * stream.time_base)
    skipped = zero - float(delay * stream.time_base) if header.container == "avi" else 0.0
    claimed = _claimed_s(container, stream, zero, end, tail.all_end_s, skipped)
    return replace(
        header,
        start_s=zero,
        duration_s=max(end - zero, 0.0),
        claimed_s=claimed,
        frames=1 if tail.last + delay <= first else header.frames,
    )


def _counted(container: Any, stream: Any, header: Header) -> Header | None:
    """The header of a raw stream: its frames are its packets, each as long as the first."""
    import av

    count, step = 0, 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):  # a damaged tail ends the file
            break
        if packet.size:
            count += 1
            step = step or packet.duration or 0
    if not count:
        return None
    step = step or round(1 / (stream.guessed_rate or DEFAULT_FPS) / stream.time_base)
    length = count * float(step * stream.time_base)
    return replace(header, duration_s=length, claimed_s=length, frames=count, step=step)


def _ends_with(path: str, last: bytes) -> bool:
    """Whether a file ends with a byte, but for some zeros of padding."""
    with open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip(b"\0").endswith(last)


def _holds_one(path: str, rules: Rules) -> bool:
    """Whether decoding gives one frame and no second."""
    with open_container(path, rules) as container:
        frames = container.decode(video_stream(container, rules))
        next(frames, None)
        return next(frames, None) is None


def _claimed_s(container: Any, stream: Any, zero: float, end: float, last: float, skipped: float) -> float:
    """Length of the frames by the header, seconds; their true length where the header is right.

    end, last: where the frames and where all streams really end, as time stamps. A container whose header
    has one length for all streams is right when its longest stream, maybe the sound, has that length, or
    ends at that time: of a segment of a longer recording (times from 4 s on, say) FFmpeg writes the end.
    skipped: length of what an AVI counts before its first frame.
    """
    if stream.duration is not None:
        claimed = float(stream.duration * stream.time_base)
        if container.format.name == "avi" and stream.frames and stream.average_rate:
            claimed = max(claimed, float(stream.frames / stream.average_rate))  # it shrinks with the file
        return claimed - skipped
    whole = container.duration / 1e6 if container.duration and not _guessed_length(container) else 0.0
    begin = (container.start_time or 0) / 1e6
    if whole > begin and _by_ffmpeg(container):
        whole -= begin
    as_length, as_end = last - begin >= whole - TOLERANCE_S, begin < whole <= last + TOLERANCE_S
    return end - zero if as_length or (as_end and not _cut(container)) else whole


def _by_ffmpeg(container: Any) -> bool:
    """Whether FFmpeg wrote a Matroska file: its "length" is the time at which the last stream ends."""
    tags = (value for key, value in container.metadata.items() if key.lower() == "encoder")
    return "matroska" in container.format.name and any(tag.startswith("Lavf") for tag in tags)


def _guessed_length(container: Any) -> bool:
    """Whether FFmpeg guessed the length from the bit rate: a Matroska header without its Duration element."""
    if "matroska" not in container.format.name:
        return False
    with open_file(container.name) as file:
        return b"\x44\x89" not in file.read(1 << 14)


def _cut(container: Any) -> bool:
    """Whether a Matroska file is shorter than its Segment element says; False where it says nothing."""
    if "matroska" not in container.format.name:
        return False
    with open_file(container.name) as file:
        head = file.read(1 << 12)
        size = file.seek(0, os.SEEK_END)
    at = head.find(b"\x18\x53\x80\x67")
    if at < 0 or at + 5 > len(head) or not head[at + 4]:
        return False
    width = 9 - head[at + 4].bit_length()  # an EBML number: leading zeros tell how many bytes it has
    value = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
    unknown = value == (1 << 7 * width) - 1
    return not unknown and at + 4 + width + value > size


@dataclass(frozen=True)
class _Tail:
    """The end of a file: when its frames and all of its streams end, in seconds as time stamps.

    last: greatest time stamp of a frame, ticks. key: a key frame was among the packets that were read.
    """

    end_s: float
    all_end_s: float
    last: int
    key: bool


def _last_packets(container: Any, stream: Any, zero: float) -> _Tail | None:
    """What follows the last key frame; None where the file cannot seek."""
    import av

    target = LAST_TICK
    for back in BACK_S:
        try:
            container.seek(target, stream=stream)
        except av.error.FFmpegError:
            return None
        tail = _packets(container, stream)
        if tail is None or (tail.key and tail.end_s > zero):
            return tail
        target = round((tail.end_s - back) / stream.time_base)
    return None


def _packets(container: Any, stream: Any) -> _Tail | None:
    """Demux to the end of the file without decoding; None where no frame is left."""
    import av

    ends: dict[int, float] = {}
    last, key = None, False
    rate = stream.guessed_rate or stream.average_rate
    packets = container.demux()
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):  # a damaged tail ends the file
            break
        pts = timestamp(packet, packet.stream)
        if pts is None or packet.is_corrupt:
            continue
        length = float((packet.duration or 0) * packet.time_base)
        if packet.stream_index == stream.index:
            length = length or (float(1 / rate) if rate else 0.0)
            last, key = max(pts, pts if last is None else last), key or packet.is_keyframe
        end = float(pts * packet.time_base) + length
        ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
    return None if last is None else _Tail(ends[stream.index], max(ends.values()), last, key)
