"""Two decoders behind one interface: `decode(path, header, times_s, size, rules)` yields frames.

Each yields (presentation time in seconds from the stream's start, RGB bytes in raster order) once per
wanted time, in order, and closes its readers before it ends. Runs inside the decoding child process.

decord reads densely wanted frames fastest; for sparse ones (long videos) a PyAV seek per frame wins,
because decord keeps decoding ahead after each seek.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .containers import Header, Rules, codec_name, open_container, origin, video_stream
from .errors import VideoError
from .sampling import EPSILON_S, shown_at, split_runs

Frames = Iterator[tuple[float, bytes]]
Decode = Callable[[str, Header, Sequence[float], tuple[int, int], Rules], Frames]

DECORD_CODECS = frozenset("h264 hevc vp8 vp9 mpeg4 mjpeg cinepak mpeg1video mpeg2video".split())
LONG_GAP_S = 10.0  # without an index, a gap at which a seek is worth trying (x264's default is 8-10 s)
WORTH_SPLITTING = 2e7  # pixels x seconds between the first and the last wanted frame


def has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


def decode_pyav(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Frames:
    """Frames through PyAV; seeks only where that skips a key frame. `size` is before rotation."""

    def one_run(times: Sequence[float], threads: int) -> Frames:
        return _pyav_run(path, times, size, rules, threads)

    yield from _in_runs(one_run, times_s, _run_count(path, header, times_s, rules), rules.threads)


def decode_decord(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Frames:
    """Frames through decord, which has already turned them upright: `size` is the upright size."""

    def one_run(times: Sequence[float], threads: int) -> Frames:
        return _decord_run(path, times, size, threads)

    yield from _in_runs(one_run, times_s, _run_count(path, header, times_s, rules), rules.threads)


def sparse(path: str, times_s: Sequence[float], rules: Rules) -> bool:
    """Whether key frames let a decoder skip more than half of the span between the wanted times."""
    if len(times_s) < 2:
        return True
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        skipped = 0.0
        for before, after in zip(times_s, times_s[1:], strict=False):
            key = _key_time(stream, after)
            skipped += max(0.0, key - before) if key is not None else 0.0
    return skipped > 0.5 * (times_s[-1] - times_s[0])


def _in_runs(one_run: Callable[..., Frames], times_s: Sequence[float], runs: int, threads: int) -> Frames:
    """Decode parts of the wanted times side by side, yield them in order."""
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
    """How many readers pay off: more than one only for much work that a key frame can divide."""
    work = (times_s[-1] - times_s[0]) * header.width * header.height
    if rules.threads < 2 or len(times_s) < 4 or work < WORTH_SPLITTING:
        return 1
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        keys = {_key_time(stream, times_s[r.start]) for r in split_runs(len(times_s), rules.threads)}
    return len(keys)


def _key_time(stream: Any, time_s: float) -> float | None:
    """Time of the last key frame at or before time_s by the file's index; None without an index."""
    entries = stream.index_entries
    if not len(entries):
        return None
    at = entries.search_timestamp(round((time_s + origin(stream)) / stream.time_base))
    return None if at < 0 else float(entries[at].timestamp * stream.time_base) - origin(stream)


def _pyav_run(
    path: str, times_s: Sequence[float], size: tuple[int, int], rules: Rules, threads: int
) -> Frames:
    with open_container(path, rules) as container:
        stream = video_stream(container, rules)
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO"
        cursor = _Cursor(container, stream)
        done: tuple[Any, bytes] | None = None
        for time in times_s:
            frame = cursor.shown_at(time)
            if done is None or done[0] is not frame:
                done = (frame, _rgb(frame, size, rules))
            yield cursor.time_of(frame), done[1]


class _Cursor:
    """A place in a video that only moves forward, from key frame to key frame where it can."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.zero = origin(stream)
        self.first_s: float | None = None if stream.start_time is None else 0.0
        self.frame: Any = None  # on screen
        self.ahead: Any = None  # the next one, already decoded
        self.frames: Iterator[Any] | None = None
        self.damaged = False

    def time_of(self, frame: Any) -> float:
        stamp = frame.pts if frame.pts is not None else frame.dts
        return float((stamp or 0) * self.stream.time_base) - self.zero

    def shown_at(self, time_s: float) -> Any:
        """The frame on screen at time_s. Raises VideoError when the file cannot show it."""
        if self._worth_seeking(time_s):
            self._seek(time_s)
        if self.frames is None:
            self.frames = self._decode()
        while self.ahead is None or self.time_of(self.ahead) <= time_s + EPSILON_S:
            following = next(self.frames, None)
            if self.ahead is not None:
                self.frame, self.ahead = self.ahead, None
            if following is None:
                break
            self.ahead = following
        shown = self.frame if self.frame is not None else self.ahead
        if shown is None or self.damaged or shown.is_corrupt:
            raise VideoError(f"it is damaged or cut off at {time_s:.1f} s; export it again or read a part before")
        return shown

    def _worth_seeking(self, time_s: float) -> bool:
        position = self.time_of(self.ahead or self.frame) if (self.ahead or self.frame) else 0.0
        if time_s <= position:
            return False
        key = _key_time(self.stream, time_s)
        return key > position if key is not None else time_s - position > LONG_GAP_S

    def _seek(self, time_s: float) -> None:
        """Jump to a key frame at or before time_s, stepping back while the jump lands too late."""
        import av

        back = 0.0
        while True:
            target = max(0.0, time_s - back)
            try:
                self.container.seek(round((target + self.zero) / self.stream.time_base), stream=self.stream)
            except av.error.FFmpegError:
                return  # no way to seek in this file: keep decoding from here
            self.frame, self.damaged = None, False
            self.frames = self._decode()
            self.ahead = next(self.frames, None)
            if target == 0.0 or (self.ahead is not None and self.time_of(self.ahead) <= time_s + EPSILON_S):
                return
            back = max(1.0, 2 * back)

    def _decode(self) -> Iterator[Any]:
        import av

        for packet in self.container.demux(self.stream):
            try:
                if packet.is_keyframe:
                    self.damaged = False
                yield from packet.decode()
            except av.error.InvalidDataError:
                self.damaged = True  # until the next key frame nothing can be relied on


def _rgb(frame: Any, size: tuple[int, int], rules: Rules) -> bytes:
    """RGB bytes of a frame scaled to (width, height)."""
    rules.check_pixels(frame.width, frame.height)
    picture = frame.reformat(*size, format="rgb24", interpolation="BICUBIC")
    plane, row = picture.planes[0], size[0] * 3
    if plane.line_size == row:
        return bytes(memoryview(plane)[: row * size[1]])
    view = memoryview(plane)
    return b"".join(view[y * plane.line_size : y * plane.line_size + row] for y in range(size[1]))


def _decord_run(path: str, times_s: Sequence[float], size: tuple[int, int], threads: int) -> Frames:
    import decord
    import numpy as np

    reader = decord.VideoReader(path, width=size[0], height=size[1], num_threads=threads, fault_tol=1)
    try:
        pts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        if np.any(np.diff(pts) < 0):
            raise VideoError("decord lists its frames out of order; read it with PyAV")
        pts = (pts - pts[0]).tolist()
        shown, picture = -1, b""
        for index in shown_at(pts, times_s):
            if index != shown:
                shown, picture = index, reader[index].asnumpy().tobytes()
            yield pts[index], picture
    finally:
        del reader  # an idle reader keeps decoding ahead: memory grows until it is gone


__all__ = ["DECORD_CODECS", "Decode", "codec_name", "decode_decord", "decode_pyav", "has_decord", "sparse"]
