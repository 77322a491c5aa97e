"""Cutting parts out of videos: real files, real times, the pictures that are promised."""

import contextlib
import io
import os

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.errors import VideoError
from encoder.video.clock import clock, seconds
from encoder.video.containers import inspect
from encoder.video.cut import cut
from encoder.video.limits import DEFAULT_LIMITS
from encoder.video.reader import probe, read_clip
from encoder.video.remux import copy_part
from tests.encoder.video.video_files import numbers_in, rotated_by_matrix, steady, truncated, uneven, write

KINDS = [
    ("mp4", "libx264", {"preset": "medium", "bf": "2"}),  # pictures out of order
    ("mov", "mjpeg", {}),
    ("mkv", "libx265", {}),
    ("webm", "libvpx-vp9", {}),
    ("ts", "libx264", {"preset": "medium", "bf": "2"}),  # without an index
    ("avi", "mpeg4", {}),
]


@pytest.mark.parametrize("trusted", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(("suffix", "encoder", "options"), KINDS)
@pytest.mark.quick(2)
def test_a_part_begins_at_a_key_frame_and_shows_what_it_says(tmp_path, suffix, encoder, options, trusted):
    pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    video = write(
        tmp_path / f"a.{suffix}", steady(75), encoder=encoder, pix_fmt=pix_fmt, gop=12, options=options
    )
    out = tmp_path / f"b.{suffix}"
    part = cut(video, 1.3, 2.1, out, trusted=trusted)
    key = 32 if encoder == "mjpeg" else 24
    assert part.start_s == pytest.approx(key / 25, abs=1e-3)
    clip = read_clip(out, 200)
    shown = numbers_in(clip)
    assert 52 <= shown[-1] <= 56
    assert sorted(set(shown)) == list(range(key, shown[-1] + 1))
    assert part.end_s == pytest.approx((shown[-1] + 1) / 25, abs=2e-3)
    for time_s, number in zip(clip.times_s, shown, strict=True):
        assert part.start_s + time_s == pytest.approx(number / 25, abs=2e-3)


def test_times_of_an_uneven_video_stay(tmp_path):
    times = uneven(40)
    video = write(tmp_path / "a.mp4", times, gop=5)
    part = cut(video, times[17], times[30], tmp_path / "b.mkv")
    clip = read_clip(tmp_path / "b.mkv", 300)
    assert part.start_s == pytest.approx(times[15], abs=1e-3)
    for time_s, number in zip(clip.times_s, numbers_in(clip), strict=True):
        assert part.start_s + time_s == pytest.approx(times[number], abs=2e-3)


def test_sound_and_rotation_come_along(tmp_path):
    plain = write(tmp_path / "plain.mp4", steady(75), sound_s=3.0)
    video = rotated_by_matrix(plain, tmp_path / "a.mp4", 90)
    part = cut(video, "0:01", "0:02", tmp_path / "b.mp4")
    assert part.sound
    before, after = probe(video), probe(tmp_path / "b.mp4")
    assert (after.width, after.height, after.rotation) == (before.width, before.height, before.rotation)
    with av.open(str(tmp_path / "b.mp4")) as container:
        sound = sum(packet.duration * packet.time_base for packet in container.demux(audio=0) if packet.size)
    assert float(sound) == pytest.approx(part.end_s - part.start_s, abs=0.1)


def test_bytes_and_an_end_beyond_the_end(tmp_path):
    video = write(tmp_path / "a.mp4", steady(50))
    part = cut(io.BytesIO(video.read_bytes()), 0, 99, tmp_path / "b.mp4")
    assert (part.start_s, part.end_s) == (0.0, pytest.approx(2.0))
    assert len(set(numbers_in(read_clip(tmp_path / "b.mp4", 100)))) == 50


def test_what_cannot_be_cut_is_one_sentence_and_leaves_nothing(tmp_path):
    video = write(tmp_path / "a.mp4", steady(50))
    gif = write(tmp_path / "a.gif", steady(20, 10), encoder="gif", pix_fmt="rgb8")
    raw = write(tmp_path / "a.h264", steady(20))
    (tmp_path / "no.mp4").write_bytes(b"no video" * 99)
    there = sorted(os.listdir(tmp_path))
    out = tmp_path / "out.mp4"
    for source, start, end, target, words in (
        (video, 1, 1, out, "must be after the start"),
        (video, 5, 6, out, "it lasts 2.00 s"),
        (video, float("nan"), 6, out, "The start cannot be nan"),
        (video, "1:75", 6, out, "The start cannot be '1:75'"),
        (video, 0, -1, out, "The end cannot be -1"),
        (video, 0, 1, tmp_path / "out.txt", "must end in one of"),
        (video, 0, 1, video, "that file exists"),
        (video, 0, 1, tmp_path / "out.webm", "webm file cannot hold h264"),
        (gif, 0, 1, out, "only videos can be cut|no times or key frames"),
        (raw, 0, 1, out, "no times or key frames"),
        (tmp_path / "no.mp4", 0, 1, out, "not a video"),
        (tmp_path / "gone.mp4", 0, 1, out, "there is no such file"),
    ):
        with pytest.raises(VideoError, match=words) as caught:
            cut(source, start, end, target)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == there
    with pytest.raises(VideoError, match="it is the video itself"):
        cut(video, 0, 1, video, overwrite=True)


def test_a_part_larger_than_memory_allows_is_refused(tmp_path):
    video = write(tmp_path / "a.mp4", steady(50))
    rules = DEFAULT_LIMITS.rules(False, 1)
    header = inspect(str(video), rules)
    part, content = copy_part(str(video), header, 0, 2, "mp4", 1 << 20, rules)
    assert part.end_s == pytest.approx(2.0)
    with pytest.raises(VideoError, match="cut a shorter one"):
        copy_part(str(video), header, 0, 2, "mp4", len(content) - 1, rules)


def test_a_video_that_is_cut_off_gives_what_is_there(tmp_path):
    whole = write(tmp_path / "a.ts", steady(100))
    video = truncated(whole, tmp_path / "b.ts", 0.6)
    part = cut(video, 1, 2, tmp_path / "c.mp4")
    assert numbers_in(read_clip(tmp_path / "c.mp4", 1, at_s=[0.0]))[0] == round(part.start_s * 25)


@given(st.floats(0, 359_999), st.integers(1, 3))
def test_a_clock_reads_what_it_writes(time_s, places):
    assert seconds(clock(time_s, places)) == pytest.approx(time_s, abs=10**-places * 0.501)
    assert len(clock(time_s).partition(".")[2]) <= 1


@given(
    st.one_of(
        st.text(max_size=12),
        st.floats(),
        st.integers(),
        st.none(),
        st.booleans(),
        st.from_regex(r"[\d:.]{1,9}", fullmatch=True),
    )
)
def test_a_time_is_seconds_from_0_up_or_one_sentence(value):
    with contextlib.suppress(VideoError):
        assert 0 <= seconds(value) <= 1e7


def test_times_as_people_write_them():
    assert [seconds(t) for t in (62, "62", "1:02", "1:23:45.5", " 0:00.25 ", "90:00")] == [
        62,
        62,
        62,
        5025.5,
        0.25,
        5400,
    ]
    for wrong in ("1:60", "1:99:00", "-1", "", "1e3", "inf", "1:2:3:4", "٣"):
        with pytest.raises(VideoError, match='or "1:02"'):
            seconds(wrong)
