"""Frame sampling by time, as properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from encoder.video.frame_times import middle_times, shown_at, split_runs

spans = st.floats(0, 1e5, allow_nan=False)
stamps = st.lists(st.integers(0, 10**7), min_size=1, max_size=60, unique=True).map(
    lambda ms: [t / 1000 for t in sorted(ms)]
)


@given(spans, spans, st.integers(1, 300))
def test_middle_times_are_ascending_inside_and_exactly_as_many(start, length, count):
    times = middle_times(start, start + length, count)
    assert len(times) == count
    assert times == sorted(times)
    assert all(start - 1e-9 <= t <= start + length + 1e-9 for t in times)


@given(stamps, st.lists(st.integers(0, 10**7), max_size=40).map(lambda ms: [t / 1000 for t in sorted(ms)]))
def test_the_frame_shown_is_the_last_one_not_after_the_time(pts, wanted):
    shown = shown_at(pts, wanted)
    assert shown == [max([i for i, p in enumerate(pts) if p <= t + 1e-6], default=0) for t in wanted]
    assert shown == sorted(shown)


@given(st.integers(1, 500), st.integers(1, 20))
def test_runs_cover_everything_once(count, runs):
    parts = split_runs(count, runs)
    assert [i for part in parts for i in part] == list(range(count))
    assert all(len(part) for part in parts)
    assert len(parts) == min(runs, count)
