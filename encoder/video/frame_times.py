"""Frame sampling by time: which times of a video to show, and which frame is on screen at each.

Runs in the decoding child too; imports neither torch nor numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from encoder.errors import VideoError
from encoder.video.containers import Header
from encoder.video.protocol import Request

EPSILON_S = 1e-6  # time stamps are rationals; one microsecond absorbs their rounding to floats


def middle_times(start_s: float, end_s: float, count: int) -> list[float]:
    """`count` times in seconds: the middles of `count` equal parts of [start_s, end_s]."""
    step = (end_s - start_s) / count
    return [start_s + (i + 0.5) * step for i in range(count)]


def spread_times(start_s: float, end_s: float, count: int, moments: Sequence[float] | None) -> list[float]:
    """The times of `moments` (0 is start_s, 1 is end_s), ascending; without them `middle_times`."""
    if moments is None:
        return middle_times(start_s, end_s, count)
    return [start_s + moment * (end_s - start_s) for moment in sorted(moments)]


def requested_times(header: Header, request: Request) -> list[float]:
    """The times that a request asks for, seconds, ascending. Raises VideoError for times the video lacks."""
    if header.kind == "image":
        return [0.0]
    end = header.duration_s
    if request.at_s is not None:
        times = sorted(request.at_s)
    else:
        first = request.start_s or 0.0
        last = request.end_s if request.end_s is not None else max(header.claimed_s, end)
        if first < 0 or last < first or (first >= end > 0):
            raise VideoError(f"the part from {first:g} to {last:g} s is not in it; it lasts {end:.2f} s")
        if not header.overstated:
            last = min(last, end)
        times = spread_times(first, last, request.frames, request.moments)
    if times[-1] > end and header.overstated:
        raise VideoError(
            f"its header says {header.claimed_s:.1f} s but it can be read only up to {end:.2f} s "
            f"(cut off or damaged); export it again or read a part of it with end_s={end:.2f}"
        )
    if times[0] < 0 or times[-1] > end + 1e-3:
        missing = times[0] if times[0] < 0 else times[-1]
        raise VideoError(f"there is no frame at {missing:g} s; it lasts {end:.2f} s")
    return times


def shown_at(pts_s: Sequence[float], times_s: Sequence[float]) -> list[int]:
    """Index of the frame a player shows at each time: the last with pts <= t, else the first.

    pts_s: presentation times in seconds, ascending, at least one. Frame rate plays no part, so that a
    variable frame rate is right by construction.
    """
    return [max(0, bisect_right(pts_s, t + EPSILON_S) - 1) for t in times_s]


def split_runs(count: int, runs: int) -> list[range]:
    """Consecutive, nearly equal ranges that cover range(count); never an empty one."""
    runs = max(1, min(runs, count))
    edges = [round(i * count / runs) for i in range(runs + 1)]
    return [range(a, b) for a, b in pairwise(edges)]
