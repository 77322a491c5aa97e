"""A part of a video as a file of its own, without coding it again: its packets are copied.

Runs inside the decoding child process (worker.py), which can open nothing: the file is made in memory and
travels to the parent like frames do. Pictures can only be shown from a key frame on, so that the part begins
with the last one at or before the wanted start.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from typing import Any

from encoder.errors import VideoError
from encoder.video.containers import COUNTED, Header, codec_name, open_container, timestamp, video_stream
from encoder.video.frame_times import EPSILON_S
from encoder.video.limits import Rules
from encoder.video.protocol import CutPart

# Muxers by the suffix of a file.
MUXERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".ts": "mpegts",
    ".avi": "avi",
}
SOUND_LAG_S = 2.0  # how much later than the pictures of a time its sound may stand in a file
_OLD_CODECS = frozenset(("rawvideo", "gif", "png"))  # pictures one by one: nothing plays them from an mp4


def copy_part(
    path: str, header: Header, start_s: float, end_s: float, muxer: str, max_bytes: int, rules: Rules
) -> tuple[CutPart, memoryview]:
    """The part from the last key frame at or before start_s to end_s, and the bytes of its file.

    muxer: FFmpeg's name of the new file's container. Raises VideoError where it cannot be cut so.
    """
    _check(header, start_s, end_s)
    out = _Bounded(max_bytes)
    with open_container(path, rules) as source:
        stream = video_stream(source, rules)
        if header.container == "avi" and stream.codec_context.has_b_frames:
            raise VideoError("an AVI does not say when its frames are shown; convert it to an mp4 first")
        packets = _from_key_frame(source, stream, header, start_s)
        part = _copy(source, stream, packets, header, end_s, muxer, out)
    return part, out.getbuffer()


def _check(header: Header, start_s: float, end_s: float) -> None:
    if header.kind == "image" or header.pillow:
        raise VideoError("it is a picture or an animation of pictures; only videos can be cut")
    if header.container in COUNTED or header.codec in _OLD_CODECS:
        raise VideoError("it has no times or key frames to cut at; convert it to h264 in mp4 first")
    if not start_s < end_s:
        raise VideoError(f"a part from {start_s:g} to {end_s:g} s is empty; the end must be after the start")
    if start_s >= header.duration_s:
        raise VideoError(f"there is nothing at {start_s:g} s; it lasts {header.duration_s:.2f} s")


class _Bounded(io.BytesIO):
    """A file in memory of at most so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._left = max_bytes

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._left:
            raise VideoError(f"the part is larger than {self._left / 2**20:.0f} MiB; cut a shorter one")
        return super().write(data)


def _from_key_frame(container: Any, stream: Any, header: Header, start_s: float) -> Iterator[Any]:
    """All packets from the last key frame shown at or before start_s on, that one first of its stream."""
    import av

    back = 0.0
    while True:
        target = max(0.0, start_s - back)
        try:
            container.seek(round((target + header.start_s) / stream.time_base), stream=stream)
        except av.error.FFmpegError as error:
            raise VideoError("it has no index to find a part by; copy it into an mp4 or mkv first") from error
        first, behind, packets = _last_key(container, stream, header, start_s, target == 0.0)
        if first is not None:
            return chain([first], behind, packets)
        if target == 0.0:
            raise VideoError("no key frame is left in that part; it is damaged or cut off")
        back = max(1.0, 2 * back)


def _last_key(
    container: Any, stream: Any, header: Header, start_s: float, at_start: bool
) -> tuple[Any, list[Any], Iterator[Any]]:
    """From here on: the last key frame shown at or before start_s, the packets behind it, and the rest.

    at_start: nothing lies before, so that a later key frame must do. None where there is none. Sound that
    lies before a key frame in the file is kept: it may be shown after it.
    """
    first, behind, packets = None, [], _readable(container)
    for packet in packets:
        stamp = timestamp(packet, stream) if packet.stream_index == stream.index and packet.size else None
        if stamp is None or not packet.is_keyframe:
            behind.append(packet)
        else:
            late = float(stamp * stream.time_base) - header.start_s > start_s + EPSILON_S
            if late and (first is not None or not at_start):
                return first, [*behind, packet], packets
            behind = [one for one in behind if one.stream_index != stream.index]
            first = packet
            if late:
                break
        passed = stamp is not None and packet.dts is not None and first is not None
        if passed and float(packet.dts * stream.time_base) - header.start_s > start_s:
            break
    return first, behind, packets


def _readable(container: Any) -> Iterator[Any]:
    """Packets up to the end of the file, or to where it is damaged."""
    import av

    packets = container.demux()
    while True:
        try:
            yield next(packets)
        except (StopIteration, av.error.FFmpegError):
            return


def _copy(
    source: Any, stream: Any, packets: Iterator[Any], header: Header, end_s: float, muxer: str, out: _Bounded
) -> CutPart:
    """Mux the packets up to end_s into `out`, their times counted from the first one's."""
    import av

    first = next(packets)
    zero_s = float(timestamp(first, stream) * stream.time_base)
    stop_s = header.start_s + end_s
    with av.open(out, "w", format=muxer) as target:
        streams = {stream.index: _like(target, stream)}
        sound = _sound(source, target)
        if sound is not None:
            streams[sound[0]] = sound[1]
        last_s = zero_s
        waiting: list[Any] = []  # pictures past the end, which earlier ones may still be coded from
        for packet in chain([first], packets):
            shown = timestamp(packet, packet.stream)
            if packet.stream_index not in streams or not packet.size or shown is None:
                continue
            begin_s = float(shown * packet.time_base)
            if packet.stream_index != stream.index:
                ready = [packet] if zero_s <= begin_s < stop_s else []
            elif begin_s < zero_s:
                continue  # of an open GOP: coded from pictures before the key frame
            else:
                coded_s = begin_s if packet.dts is None else float(packet.dts * packet.time_base)
                if coded_s >= stop_s + (0.0 if sound is None else SOUND_LAG_S):
                    break
                waiting.append(packet)
                if begin_s >= stop_s:
                    continue
                ready, waiting = waiting, []
                last_s = max(last_s, *(_end_s(one, stream) for one in ready))
            for one in ready:
                _mux(target, one, streams[one.stream_index], zero_s)
    start_s = zero_s - header.start_s
    return CutPart(
        round(max(0.0, start_s), 6), round(max(last_s - header.start_s, start_s), 6), sound is not None
    )


def _end_s(packet: Any, stream: Any) -> float:
    """When a picture goes again, in seconds as a time stamp; some files do not say how long each stays."""
    rate = stream.guessed_rate or stream.average_rate
    length = float((packet.duration or 0) * packet.time_base) or (float(1 / rate) if rate else 0.0)
    return float((timestamp(packet, stream) or 0) * packet.time_base) + length


def _mux(target: Any, packet: Any, stream: Any, zero_s: float) -> None:
    zero = round(zero_s / packet.time_base)
    packet.stream = stream
    packet.pts = None if packet.pts is None else packet.pts - zero
    packet.dts = None if packet.dts is None else packet.dts - zero
    target.mux(packet)


def _like(target: Any, stream: Any) -> Any:
    """A stream of the new file for the packets of an old one; raises VideoError where it cannot hold them."""
    try:
        return target.add_stream_from_template(stream, opaque=True)
    except ValueError as error:
        name = codec_name(stream)
        raise VideoError(
            f"a {target.format.name} file cannot hold {name}; give the new file a name that ends in .mkv"
        ) from error


def _sound(source: Any, target: Any) -> tuple[int, Any] | None:
    """The index of the sound and its stream in the new file; None without sound that this can hold."""
    sound = source.streams.best("audio")
    if sound is None or sound.codec_context is None:
        return None
    try:
        return sound.index, target.add_stream_from_template(sound, opaque=True)
    except ValueError:
        return None
