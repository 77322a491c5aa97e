"""Containers: intact files are read whatever their time stamps (segments, raw streams, gaps)."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.errors import VideoError
from encoder.video.reader import probe, read_clip
from tests.encoder.video import video_files as vf

SIZE = (64, 48)
REORDERED = {"preset": "veryfast", "bf": "2"}  # B-frames: the first time stamp is not 0
WRAP_S = 2**33 / 90_000  # where the clock of MPEG-TS starts again


def assert_read_exactly(path: Path, times_s: list[float], last_s: float = 0.04) -> None:
    """Every frame at its own time, ascending from 0; the length right within one frame; both trust levels."""
    for trusted in (True, False):
        clip = read_clip(path, at_s=[t + 0.01 for t in times_s], trusted=trusted)
        assert vf.numbers_in(clip) == list(range(len(times_s)))
        assert list(clip.times_s) == pytest.approx(times_s, abs=0.006)
        assert clip.duration_s == pytest.approx(times_s[-1] + last_s, abs=0.041)
        assert clip.info.kind == "video"
    assert len(read_clip(path, 5).times_s) == 5  # up to the end as the header says it


@pytest.mark.parametrize("start_s", [pytest.param(4.0, marks=pytest.mark.slow), 100.0])
@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.mp4", "libx264", {}),
        ("a.mov", "libx264", {}),
        ("a.ts", "libx264", {}),
        ("live.mkv", "libx264", {}),
        ("fragments.mp4", "libx264", {}),
    ],
)
@pytest.mark.quick(1)
def test_a_segment_of_a_longer_recording_starts_at_zero(tmp_path, name, encoder, options, start_s):
    container = {"live.mkv": {"live": "1"}, "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"}}
    times = vf.steady(14)
    path = vf.write(
        tmp_path / name,
        [start_s + t for t in times],
        encoder=encoder,
        options=options or (REORDERED if encoder == "libx264" else {}),
        size=SIZE,
        gop=8,
        container_options=container.get(name),
    )
    assert_read_exactly(path, times)


@pytest.mark.parametrize(
    ("suffix", "encoder", "options"),
    [
        ("h264", "libx264", {}),
        ("h264", "libx264", REORDERED),
        ("hevc", "libx265", {"x265-params": "log-level=none:pools=1:bframes=2"}),
        ("m4v", "mpeg4", {"bf": "2"}),
        ("obu", "libsvtav1", {}),
        ("ivf", "libvpx", {}),
        ("ivf", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "good"}),
        ("y4m", "rawvideo", {}),
    ],
)
@pytest.mark.quick(3)
def test_raw_streams_are_counted_from_their_start(tmp_path, suffix, encoder, options):
    path = vf.write(
        tmp_path / f"a.{suffix}", vf.steady(14), encoder=encoder, options=options, size=SIZE, gop=8
    )
    assert_read_exactly(path, vf.steady(14))


def test_a_raw_stream_keeps_its_own_rate(tmp_path):
    path = vf.write(tmp_path / "a.h264", vf.steady(10, 10.0), rate=10, size=SIZE, options=REORDERED)
    assert probe(path).duration_s == pytest.approx(1.0, abs=0.01)


def test_raw_streams_that_the_allow_list_leaves_out(tmp_path):
    path = vf.write(tmp_path / "a.m2v", vf.steady(10), encoder="mpeg2video", size=SIZE)
    assert len(read_clip(path, 5).times_s) == 5
    with pytest.raises(VideoError, match="not allowed"):
        read_clip(path, 5, trusted=False)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_frames_before_an_edit_list_are_not_shown(tmp_path, name):
    """The muxer writes an edit list for frames before 0."""
    times = [t - 0.2 for t in vf.steady(24)]
    path = vf.write(tmp_path / name, times, options=REORDERED, size=SIZE, gop=8)
    for trusted in (True, False):
        clip = read_clip(path, at_s=[0.01 + t for t in vf.steady(19)], trusted=trusted)
        assert vf.numbers_in(clip) == list(range(5, 24))
        assert clip.duration_s == pytest.approx(0.76, abs=0.041)


@pytest.mark.parametrize("before_s", [0.3, 0.02])
def test_the_clock_of_a_transport_stream_wraps_around(tmp_path, before_s):
    times = vf.steady(14)
    path = vf.write(
        tmp_path / "a.ts", [WRAP_S - before_s + t for t in times], options=REORDERED, size=SIZE, gop=8
    )
    assert_read_exactly(path, times)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_a_gap_between_frames(tmp_path, name):
    times = [*vf.steady(6), *(20.0 + t for t in vf.steady(6))]
    path = vf.write(tmp_path / name, times, options=REORDERED, size=SIZE, gop=8)
    assert_read_exactly(path, times)
    assert [vf.number_in(f.numpy()) for f in read_clip(path, at_s=[10.0]).frames] == [5]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
@pytest.mark.parametrize("sound_s", [0.3, 2.0])
@pytest.mark.quick(3)
def test_sound_of_another_length(tmp_path, name, sound_s):
    path = vf.write(
        tmp_path / name,
        [4.0 + t for t in vf.steady(14)],
        sound_s=sound_s,
        options=REORDERED,
        size=SIZE,
        gop=8,
    )
    assert_read_exactly(path, vf.steady(14))


def test_a_recording_that_begins_between_two_key_frames(tmp_path):
    path = vf.write(tmp_path / "a.ts", vf.steady(60), options=REORDERED, size=SIZE, gop=20)
    data = path.read_bytes()
    first = next(at for at in range(188 * 20, len(data), 188) if data[at + 1] & 0x40)  # a packet that begins
    path.write_bytes(data[: 188 * 3] + data[first:])
    for trusted in (True, False):
        clip = read_clip(path, 4, trusted=trusted)
        numbers = vf.numbers_in(clip)
        zero = numbers[0] - round(clip.times_s[0] * 25)
        assert 10 < zero < 50
        assert [n - zero for n in numbers] == [round(t * 25) for t in clip.times_s]
        assert clip.duration_s == pytest.approx((60 - zero) * 0.04, abs=0.041)


@pytest.mark.parametrize(
    ("suffix", "encoder", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mkv", "libx264", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("gif", "gif", "rgb8"),
        ("h264", "libx264", "yuv420p"),
        ("ivf", "libvpx", "yuv420p"),
        ("obu", "libsvtav1", "yuv420p"),
        ("y4m", "rawvideo", "yuv420p"),
    ],
)
@pytest.mark.quick(2)
def test_one_frame_is_an_image_and_two_are_a_video(tmp_path, suffix, encoder, pix_fmt):
    for count, kind, numbers in ((1, "image", [0]), (2, "video", [0, 1, 1])):
        path = vf.write(
            tmp_path / f"a.{suffix}", vf.steady(count), encoder=encoder, pix_fmt=pix_fmt, size=SIZE
        )
        for trusted in (True, False):
            clip = read_clip(path, 3, trusted=trusted)
            assert clip.info.kind == kind
            assert vf.numbers_in(clip) == numbers
            assert clip.duration_s == pytest.approx(0.0 if count == 1 else 0.08, abs=0.041)


@pytest.mark.parametrize("start_s", [4.0, 100.0])
@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4"])
@pytest.mark.quick(2)
def test_a_truncated_segment_is_an_error(tmp_path, name, start_s):
    times = [start_s + t for t in vf.steady(100)]
    path = vf.write(
        tmp_path / name,
        times,
        encoder="libvpx" if name == "a.webm" else "libx264",
        size=SIZE,
        container_options={"movflags": "faststart"} if name == "a.mp4" else None,
    )
    vf.truncated(path, path, 0.5)
    with pytest.raises(VideoError, match=r"says 4\.0 s but it can be read only up to .* \(cut off"):
        read_clip(path, 4)
