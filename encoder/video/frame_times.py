"""Which moments of a video to look at, and which frame is on screen at each of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

EPSILON_S = 1e-6  # time stamps are rationals; one microsecond absorbs their rounding to floats


def middle_times(start_s: float, end_s: float, count: int) -> list[float]:
    """`count` moments in seconds: the middles of `count` equal parts of [start_s, end_s]."""
    step = (end_s - start_s) / count
    return [start_s + (i + 0.5) * step for i in range(count)]


def spread_times(start_s: float, end_s: float, count: int, moments: Sequence[float] | None) -> list[float]:
    """The times of `moments` (0 is start_s, 1 is end_s), ascending; without them `middle_times`."""
    if moments is None:
        return middle_times(start_s, end_s, count)
    return [start_s + moment * (end_s - start_s) for moment in sorted(moments)]


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


def fit_within(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Size with the longer side at most max_side, aspect kept, never enlarged."""
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))
