"""The decoders behind one interface, `decode_frames`: PyAV, decord, and Pillow for image files.

Each yields (presentation time in seconds from the first frame, RGB bytes in raster order) once per wanted
time, in order, and closes its readers before it ends. Runs inside the decoding child process. For the
transparency of WebM, which FFmpeg's own decoders ignore, PyAV decodes by libvpx.

decord is fast for densely sampled frames. It is wrong or slow elsewhere, where PyAV takes over: after a seek
into an open GOP it counts the dropped leading frames and returns other frames than asked for (about half
of them in HEVC as x265 writes it), in files without an index (MPEG-TS) it returns later frames than asked
for, it knows no mirror, crop or transparency, and in long videos it keeps decoding ahead after each seek.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from encoder.errors import VideoError
from encoder.video.containers import (
    Header,
    codec_name,
    has_alpha,
    has_webm_alpha,
    open_container,
    timestamp,
    video_stream,
)
from encoder.video.descriptors import native_path
from encoder.video.frame_times import EPSILON_S, shown_at, split_runs
from encoder.video.images import decode_image, opaque_rgb
from encoder.video.limits import Rules

Frames = Iterator[tuple[float, bytes | memoryview]]
OneRun = Callable[[Sequence[float], int], Frames]

DECORD_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg", "cinepak", "mpeg2video"))
DECORD_CONTAINERS = frozenset(("mov", "matroska", "avi"))  # with an index that decord counts by
LONG_GAP_S = 10.0  # without an index, a gap at which a seek is worth trying (x264's default is 8-10 s)
MAX_LOST = 1  # a packet without a frame is normal (VP8's hidden reference frames), two in a row are damage
MAX_REORDER = 64  # packets that a decoder may hold back
MIN_PARALLEL_WORK = 2e7  # pixels x seconds between the first and the last wanted frame


def decode_frames(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules, decoder: str
) -> Iterator[tuple[float, bytes | memoryview, int, bool]]:
    """(time, RGB bytes, turns, mirror) of each wanted frame, by the decoder that suits.

    `size` is upright; turns and mirror are what is still to be done (DisplayGeometry). With decoder "auto",
    frames that decord cannot deliver come from PyAV.
    """
    if header.pillow:
        yield from ((t, rgb, 0, False) for t, rgb in decode_image(path, header, times_s, size, rules))
        return
    if decoder == "auto" and not decord_suits(path, header, times_s, rules):
        decoder = "pyav"
    done = 0
    if decoder != "pyav":
        try:
            for t, rgb in decode_decord(path, header, times_s, size, rules):
                yield t, rgb, 0, False
                done += 1
            return
        except VideoError:
            if decoder == "decord":
                raise
        except Exception as error:  # decord raises bare RuntimeError, EOF and its own kinds
            if decoder == "decord":
                raise VideoError(
                    f"decord cannot read its {header.codec} frames; use decoder='auto'"
                ) from error
    raw = size if header.turns % 2 == 0 else size[::-1]
    for t, rgb in decode_pyav(path, header, times_s[done:], raw, rules):
        yield t, rgb, header.turns, header.mirror


def decode_pyav(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Frames:
    """Frames through PyAV; seeks only where that skips a key frame. `size` is before turning."""
    yield from _in_runs(
        lambda times, threads: _pyav_run(path, header, times, size, rules, threads),
        times_s,
        _run_count(path, header, times_s, rules),
        rules.threads,
    )


def decode_decord(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Frames:
    """Frames through decord, which has already turned them upright: `size` is the upright size.

    Raises VideoError for a file that decord would show or read wrongly.
    """
    if not _decord_supports(header):
        raise VideoError("decord would not show its frames as they should be; use decoder='auto'")
    pts_s = _decord_timeline(path, header, rules)
    yield from _in_runs(
        lambda times, threads: _decord_run(path, pts_s, times, size, threads),
        times_s,
        _run_count(path, header, times_s, rules),
        rules.threads,
    )


def decord_suits(path: str, header: Header, times_s: Sequence[float], rules: Rules) -> bool:
    """Whether decord is installed, may be used, and is likely to be as fast as PyAV for these times.

    In one thread it never is: it needs more CPU time (tests/bench/load.py), and a list of all packets.
    """
    if (
        rules.threads < 2
        or not rules.trusted
        or not _decord_supports(header)
        or not importlib.util.find_spec("decord")
    ):
        return False
    with open_container(path, rules) as container:
        return not _sparse(video_stream(container, rules), header, times_s)


def _decord_supports(header: Header) -> bool:
    return header.plain and header.codec in DECORD_CODECS and header.container in DECORD_CONTAINERS


def _sparse(stream: Any, header: Header, times_s: Sequence[float]) -> bool:
    """Whether key frames let a decoder skip more than half of the span between the wanted times."""
    skipped = 0.0
    for before, after in pairwise(times_s):
        key = _key_time(stream, header, after)
        skipped += max(0.0, key - before) if key is not None else 0.0
    return skipped > 0.5 * (times_s[-1] - times_s[0])


def _decord_timeline(path: str, header: Header, rules: Rules) -> list[float]:
    """Exact times of all frames in the order shown (decord's own are 32-bit floats), seconds.

    Raises VideoError for a stream that decord would read wrongly: an open GOP, or packets without times.
    """
    stamps: list[int] = []
    key: int | None = None
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        if container.format.name == "avi" and stream.codec_context.has_b_frames:
            raise VideoError("decord cannot tell the times of its frames; use decoder='auto'")
        for packet in container.demux(stream):
            if not packet.size:
                continue
            shown = timestamp(packet, stream)
            if shown is None or packet.is_discard:
                raise VideoError("decord cannot tell the times of its frames; use decoder='auto'")
            if key is not None and shown < key:
                raise VideoError("decord reads wrong frames from its open GOPs; use decoder='auto'")
            if packet.is_keyframe and header.codec == "h264" and not _restarts(bytes(packet), stream):
                raise VideoError("decord reads wrong frames where no key frame is whole; use decoder='auto'")
            key = shown if packet.is_keyframe else key
            stamps.append(shown)
        tick = float(stream.time_base)
    return [shown * tick - header.start_s for shown in sorted(stamps)]


def _restarts(packet: bytes, stream: Any) -> bool:
    """Whether an H.264 key frame is a whole frame (IDR) rather than the start of a gradual refresh."""
    idr = 5
    types: list[int] = []
    extra = stream.codec_context.extradata or b""
    if extra[:1] == b"\1" and len(extra) > 4:  # avcC: units with their lengths before them
        width, at = (extra[4] & 3) + 1, 0
        while at + width < len(packet):
            types.append(packet[at + width] & 31)
            at += width + int.from_bytes(packet[at : at + width], "big")
    else:
        types = [unit[0] & 31 for unit in packet.split(b"\0\0\1")[1:] if unit]
    return idr in types


def _in_runs(one_run: OneRun, times_s: Sequence[float], runs: int, threads: int) -> Frames:
    """Decode parts of the wanted times in parallel, yield them in order."""
    parts = [times_s[r.start : r.stop] for r in split_runs(len(times_s), runs)]
    if len(parts) == 1:
        yield from one_run(parts[0], threads)
        return
    with ThreadPoolExecutor(len(parts) - 1) as pool:
        later = [pool.submit(lambda part: list(one_run(part, 1)), part) for part in parts[1:]]
        yield from one_run(parts[0], 1)
        for part in later:
            yield from part.result()


def _run_count(path: str, header: Header, times_s: Sequence[float], rules: Rules) -> int:
    """Number of parallel readers: more than one only for much work that key frames can divide."""
    work = (times_s[-1] - times_s[0]) * header.width * header.height
    if rules.threads < 2 or len(times_s) < 4 or work < MIN_PARALLEL_WORK or header.step:
        return 1
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        starts = (times_s[run.start] for run in split_runs(len(times_s), rules.threads))
        return len({_key_time(stream, header, start) for start in starts})


def _key_time(stream: Any, header: Header, time_s: float) -> float | None:
    """Time of the last key frame at or before time_s by the file's index; None without an index."""
    entries = stream.index_entries
    if header.step or not len(entries):
        return None
    at = entries.search_timestamp(round((time_s + header.start_s) / stream.time_base))
    return None if at < 0 else float(entries[at].timestamp * stream.time_base) - header.start_s


def _pyav_run(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules, threads: int
) -> Frames:
    from av.video.reformatter import VideoReformatter

    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO"
        cursor = _Cursor(container, stream, header)
        shown: Any = None
        rgb: bytes | memoryview = b""
        reformatter = VideoReformatter()
        for time in times_s:
            frame = cursor.shown_at(time)
            if frame is not shown:
                rules.check_pixels(frame.width, frame.height)
                shown, rgb = frame, _rgb(frame, size, header, reformatter)
            yield max(0.0, cursor.time_of(frame)), rgb


class _Cursor:
    """A position in a video that only moves forward, from key frame to key frame where it can."""

    def __init__(self, container: Any, stream: Any, header: Header) -> None:
        self.container, self.stream, self.header = container, stream, header
        self.frame: Any = None  # on screen
        self.ahead: Any = None  # the next one, already decoded
        self.pending: list[int] = []  # time stamps of packets that gave no frame yet
        self.decoder = _decoder(stream)
        self.frames = self._counted() if header.step else self._decode()

    def time_of(self, frame: Any) -> float:
        return float(frame.pts * self.stream.time_base) - self.header.start_s

    def shown_at(self, time_s: float) -> Any:
        """The frame on screen at time_s. Raises VideoError when the file cannot show it."""
        if self._worth_seeking(time_s):
            self._seek(time_s)
        while self.ahead is None or self.time_of(self.ahead) <= time_s + EPSILON_S:
            if self.ahead is not None:
                self.frame = self.ahead
            self.ahead = next(self.frames, None)
            if self.ahead is None:
                break
        shown = self.frame or self.ahead
        if shown is None or shown.is_corrupt or self._lost(shown, time_s) > MAX_LOST:
            raise VideoError(
                f"it is damaged or cut off at {time_s:.2f} s; export it again or read another part of it"
            )
        return shown

    def _lost(self, shown: Any, time_s: float) -> int:
        """How many packets between the frame shown and time_s gave no frame."""
        end = (time_s + self.header.start_s) / float(self.stream.time_base)
        self.pending = [stamp for stamp in self.pending if stamp > shown.pts]
        return sum(stamp <= end for stamp in self.pending)

    def _worth_seeking(self, time_s: float) -> bool:
        if self.header.step:
            return False
        reached = self.ahead or self.frame
        position = self.time_of(reached) if reached else 0.0
        if time_s <= position:
            return False
        key = _key_time(self.stream, self.header, time_s)
        return key > position if key is not None else time_s - position > LONG_GAP_S

    def _seek(self, time_s: float) -> None:
        """Jump to a key frame at or before time_s, stepping back while the jump lands too late."""
        import av

        back = 0.0
        while True:
            target = max(0.0, time_s - back)
            stamp = round((target + self.header.start_s) / self.stream.time_base)
            try:
                self.container.seek(stamp, stream=self.stream)
            except av.error.FFmpegError:
                return  # no way to seek in this file: keep decoding from here
            self.frame, self.pending = None, []
            self.decoder.flush_buffers()
            self.frames = self._decode(sought=True)
            self.ahead = next(self.frames, None)
            if target == 0.0 or (self.ahead is not None and self.time_of(self.ahead) <= time_s + EPSILON_S):
                return
            back = max(1.0, 2 * back)

    def _decode(self, sought: bool = False) -> Iterator[Any]:
        """Frames from here on, each with a `pts`, also where the file has none. sought: not the start."""
        import av

        start = round(self.header.start_s / self.stream.time_base) - 1
        last: int | None = None if sought else start
        for packet in self.container.demux(self.stream):
            packet_stamp = timestamp(packet, self.stream)
            if packet_stamp is not None:
                self.pending.append(packet_stamp)
            try:
                for frame in self.decoder.decode(packet):
                    shown = timestamp(frame, self.stream)
                    if shown is None:  # flushed at the end of the file: one tick after all others
                        shown = (max(self.pending, default=start) if last is None else last) + 1
                    frame.pts = last = shown
                    if len(self.pending) > 2 * MAX_REORDER:  # frames already passed are not counted any more
                        self.pending = [s for s in self.pending if s >= last]
                    yield frame
            except av.error.InvalidDataError:
                continue  # counted as lost if it is wanted

    def _counted(self) -> Iterator[Any]:
        """Frames of a raw stream, `step` ticks apart; what cannot be decoded takes its time as well."""
        import av

        count = 0
        for packet in self.container.demux(self.stream):
            try:
                for frame in self.decoder.decode(packet):
                    frame.pts, count = count * self.header.step, count + 1
                    yield frame
            except av.error.InvalidDataError:
                self.pending.append(count * self.header.step)
                count += 1


def _decoder(stream: Any) -> Any:
    """Decoder of a stream: its default one, or libvpx where only that decodes transparency."""
    import av

    if not has_webm_alpha(stream):
        return stream.codec_context
    try:
        return av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec_name(stream)], "r")
    except (av.codec.codec.UnknownCodecError, ValueError):  # a PyAV build without libvpx
        return stream.codec_context


def _rgb(frame: Any, size: tuple[int, int], header: Header, reformatter: Any) -> bytes | memoryview:
    """RGB bytes of a frame scaled to (width, height); one reformatter serves all frames of a run."""
    if header.crop is not None or has_alpha(frame, header.codec):
        return _composed(frame, size, header, reformatter)
    scaled = reformatter.reformat(frame, *size, format="rgb24", interpolation="BICUBIC")
    plane, row = scaled.planes[0], size[0] * 3
    view = memoryview(plane)
    if plane.line_size == row:
        return view[: row * size[1]]
    return b"".join(view[y * plane.line_size : y * plane.line_size + row] for y in range(size[1]))


def _composed(frame: Any, size: tuple[int, int], header: Header, reformatter: Any) -> bytes:
    """The same for a frame that is cropped or transparent, by way of Pillow."""
    from PIL import Image

    whole = reformatter.reformat(frame, frame.width, frame.height, format="rgba")
    plane, extent = whole.planes[0], (frame.width, frame.height)
    image = Image.frombuffer("RGBA", extent, bytes(plane), "raw", "RGBA", plane.line_size, 1)
    left, top, right, bottom = header.crop or (0.0, 0.0, 1.0, 1.0)
    box = (left * extent[0], top * extent[1], right * extent[0], bottom * extent[1])
    return opaque_rgb(image).resize(size, Image.Resampling.BICUBIC, box).tobytes()


def _decord_run(
    path: str, pts_s: Sequence[float], times_s: Sequence[float], size: tuple[int, int], threads: int
) -> Frames:
    import decord
    import numpy as np

    reader = decord.VideoReader(native_path(path), width=size[0], height=size[1], num_threads=threads)
    try:
        decord_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        if len(decord_s) != len(pts_s) or np.any(
            np.diff(decord_s) <= 0
        ):  # e.g. h264 in avi: all of them zero
            raise VideoError("decord counts its frames wrongly; use decoder='auto'")
        shown, rgb = -1, memoryview(b"")
        for index in shown_at(pts_s, times_s):
            if index != shown:
                pixels = reader[index].asnumpy()
                if pixels.shape != (size[1], size[0], 3):  # it takes the padding of rows for pixels
                    raise VideoError("decord gives frames of another size; use decoder='auto'")
                shown, rgb = index, pixels.data.cast("B")
            yield pts_s[index], rgb
    finally:
        del reader  # an idle reader keeps decoding ahead: memory grows until it is gone
